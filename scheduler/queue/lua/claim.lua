-- Gives a worker what fits: renews its lease, then lanes, classes by stride, tenants by least service, FIFO inside.
-- Returns one {id, attempt, body, class, tenant, rows, lost, deadline, fails} per job, ids of jobs to hand back, and 1
-- where work may be left that found no room here.
local asker = { worker = ARGV[1], pool = ARGV[4], own = $own .. ARGV[1], rows = tonumber(ARGV[5]),
  total_rows = tonumber(ARGV[6]), kv = tonumber(ARGV[7]), total_kv = tonumber(ARGV[8]),
  urgent_slack = tonumber(ARGV[10]), kv_threshold = tonumber(ARGV[11]),
  jobs = {}, claims = {}, readings = {}, given = {}, least = {}, charged = {} }
local ttl, nonce, may_preempt = tonumber(ARGV[2]), ARGV[3], ARGV[9] == '1'
redis.call('PEXPIRE', asker.own, $slack_ms)  -- always allowed, so that the script passes at maxmemory
asker.now = now_ms()
asker.since = text(asker.now) .. ' ' .. asker.worker
asker.started = cmsgpack.pack({ type = 'started', worker = asker.worker, at_ms = asker.now })
redis.call('ZADD', $lease, text(asker.now + ttl), asker.worker)

-- The reply to this very claim got lost: say the same again.
local function repeated()
  local last = redis.call('GET', $lastclaim .. asker.worker)
  if not last or string.match(last, '^%S+') ~= nonce then return nil end
  local jobs = {}
  for id in string.gmatch(last, ' (%S+)') do
    if redis.call('HEXISTS', asker.own, id) == 1 then jobs[#jobs + 1] = describe(id, load_job(id)) end
  end
  return with_bodies(jobs)
end

-- Takes the work; nil: there was none after all. Returns the job as second where it does not fit.
local function serve(work)
  local job = work.id and load_job(work.id)
  if work.id and not (job and job.state == 'queued' and job.sid == work.sid) then
    step(asker, work.stream)
    drop_entry(work.stream, work.sid)  -- its hash is gone: the entry belongs to nobody
    return nil
  end
  if job and not fits(asker, job) then return false, job end
  if job then take(asker, work, job) end
  if work.class and not peek(asker, work.stream) then
    settle_charges(asker, work.class)
    deactivate(asker.pool, work.class, work.tenant)
  end
end

-- A job that runs alone wants an idle worker: one worker stops claiming until it is idle. Returns whether such a job
-- concerns this worker.
local function solo()
  if asker.holds == 1 and redis.call('HGET', $job .. held(asker)[1], 'lane') == 'solo' then return true end
  local work, hold = in_lane(asker, 'solo'), $hold .. asker.pool
  if not work then return false end
  local holder = redis.call('GET', hold)
  if holder and holder ~= asker.worker then return false end
  redis.call('SET', hold, asker.worker, 'PX', $solo_hold_ms)
  if asker.holds > 0 then return true end
  serve(work)
  redis.call('DEL', hold)
  return true
end

-- The class of work that is left but has no room here, if any, and whom to hand back for it.
local function fill()
  for _ = 1, 1024 do
    local work = next_work(asker)
    if not work then return nil, {} end
    local taken, job = serve(work)
    if taken == false then  -- skipping the head would starve long prompts
      return job.class, may_preempt and name_victims(asker, work, job) or {}
    end
    if asker.rows <= 0 and not may_preempt then
      work = next_work(asker)
      return work and (work.class or 'high'), {}
    end
  end
  return nil, {}
end

local function note_rate()
  local rate = $rate .. asker.pool
  local seen = redis.call('HMGET', rate, 'at', unpack(CLASSES))
  local decay, fields = math.exp((tonumber(seen[1] or asker.now) - asker.now) / 30000), { 'at', text(asker.now) }
  for i, class in ipairs(CLASSES) do
    local count = tonumber(seen[i + 1] or 0) * decay + (asker.claims[class] or 0)
    if count > 0 then
      fields[#fields + 1], fields[#fields + 2] = class, string.format('%.6g', count)
    end
  end
  redis.call('HSET', rate, unpack(fields))
  redis.call('PEXPIRE', rate, $rate_ms)
end

local jobs = repeated()
if jobs then return { jobs, {}, 1 } end
look_at_lanes(asker)
if asker.paused.all then return { {}, {}, 0 } end
load_passes(asker)
asker.holds = redis.call('HLEN', asker.own)
asker.idle = asker.holds == 0
local more, preempt, alone = nil, {}, solo()
if not alone and (asker.rows > 0 or may_preempt) then more, preempt = fill() end
local is_left = (more or alone or asker.holds_back) and 1 or 0
jobs = asker.jobs
if #jobs == 0 then return { jobs, preempt, is_left } end

local ids = nonce
for _, job in ipairs(jobs) do ids = ids .. ' ' .. job[1] end
redis.call('SET', $lastclaim .. asker.worker, ids, 'PX', $rate_ms)
expire(asker.own, $slack_ms)
for _, class in ipairs(CLASSES) do settle_charges(asker, class) end
give_all(asker)
save_passes(asker)
note_rate()
if more then ring(asker.pool, more) end
return { with_bodies(jobs), preempt, is_left }
