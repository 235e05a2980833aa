-- Gives a worker what fits: renews its lease, then lanes, classes by stride, tenants by least service, FIFO inside.
-- Returns one {id, attempt, body, class, tenant, rows, lost, deadline, fails} per job.
local worker, ttl, nonce, pool = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local free_rows, total_rows, free_kv = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local own = $own .. worker
redis.call('PEXPIRE', own, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local now = now_ms()
redis.call('ZADD', $lease, now + ttl, worker)

local function describe(id, job)
  return { id, job.attempt, redis.call('GET', $body .. id) or '', job.class, job.tenant, job.rows, job.lost,
    job.deadline, job.fails }
end

-- The reply to this very claim got lost: say the same again.
local function repeated()
  local last = redis.call('GET', $lastclaim .. worker)
  if not last or string.match(last, '^%S+') ~= nonce then return nil end
  local jobs = {}
  for id in string.gmatch(last, ' (%S+)') do
    if redis.call('HEXISTS', own, id) == 1 then jobs[#jobs + 1] = describe(id, load_job(id)) end
  end
  return jobs
end

local function charge(job)
  local passes, cost = $passes .. pool, math.max(1, job.cost)
  local pass = tonumber(redis.call('HGET', passes, job.class) or 0)
  redis.call('HSET', passes, 'now', string.format('%.17g', pass), job.class,
    string.format('%.17g', pass + cost / WEIGHT[job.class]))
  redis.call('PEXPIRE', passes, $counter_ms)
  redis.call('ZINCRBY', $active .. pool .. ':' .. job.class, cost, job.tenant)
end

local function start(id, job)
  local hash, log = $job .. id, $log .. id
  local keep = job.qttl + $slack_ms
  job.attempt = job.attempt + 1
  local first = job.attempt .. '-0'
  local payload = cmsgpack.pack({ type = 'started', worker = worker, at_ms = now })
  redis.call('HSET', hash, 'state', 'running', 'attempt', job.attempt, 'worker', worker,
    'a:' .. job.attempt, now .. ' ' .. worker)
  redis.call('HSETNX', hash, 'started', now)
  redis.call('HDEL', hash, 'a:' .. (job.attempt - 16))
  redis.call('HSET', own, id, job.attempt)
  redis.call('XADD', log, first, 'p', payload)
  redis.call('PUBLISH', $channel .. id, first .. ' ' .. payload)
  redis.call('PEXPIRE', hash, keep)
  redis.call('PEXPIRE', log, keep)
  redis.call('PEXPIRE', $body .. id, keep)
  if job.deadline > 0 then
    redis.call('ZADD', $deadlines, job.deadline, id)
  else
    redis.call('ZREM', $deadlines, id)
  end
end

local function take(id, job, stream)
  redis.call('XREADGROUP', 'GROUP', $group, worker, 'COUNT', 1, 'STREAMS', stream, '>')
  redis.call('SADD', $touched .. worker, stream)
  count_depth(job, -1)
  if WEIGHT[job.lane] then charge(job) end
  start(id, job)
  free_rows = free_rows - math.min(job.rows, total_rows)
  free_kv = free_kv - job.kv
end

-- The stream to serve next: resume before everything, then the class with the least pass, its least served tenant.
-- The `urgent` lane (deadline slack, at most half of the rows) would stand between the two.
local function next_stream()
  local resume = $queue .. pool .. ':resume:-'
  if head(resume) then return resume end
  local best, chosen, tenant
  local passes = redis.call('HMGET', $passes .. pool, 'high', 'normal', 'low', 'batch')
  for i, class in ipairs({ 'high', 'normal', 'low', 'batch' }) do
    local least = redis.call('ZRANGE', $active .. pool .. ':' .. class, 0, 0)[1]
    local pass = tonumber(passes[i] or 0)
    if least and (not best or pass < best) then best, chosen, tenant = pass, class, least end
  end
  if chosen then return $queue .. pool .. ':' .. chosen .. ':' .. tenant, chosen, tenant end
end

local function fits(job, idle)
  return math.min(job.rows, total_rows) <= free_rows and (idle or job.kv <= free_kv)
end

-- Looks at the head of a stream. Returns a claimed job, or false where it does not fit, or nil where there was none.
local function serve(stream, class, tenant, idle)
  local sid, id = head(stream)
  local job = sid and load_job(id)
  if sid and not (job and job.state == 'queued' and job.sid == sid) then
    drop_entry(stream, sid)  -- its hash is gone: the entry belongs to nobody
    return nil
  end
  if job and not fits(job, idle) then return false end
  if job then take(id, job, stream) end
  if class and not head(stream) then deactivate(pool, class, tenant) end
  return job and describe(id, job)
end

-- A job that runs alone wants an idle worker: one worker stops claiming until it is idle. Returns nil where no such
-- job concerns this worker, else the jobs to return.
local function solo(held)
  if #held == 1 and redis.call('HGET', $job .. held[1], 'lane') == 'solo' then return {} end
  local stream, hold = $queue .. pool .. ':solo:-', $hold .. pool
  if not head(stream) then return nil end
  local holder = redis.call('GET', hold)
  if holder and holder ~= worker then return nil end
  redis.call('SET', hold, worker, 'PX', $solo_hold_ms)
  if #held > 0 then return {} end
  local job = serve(stream, nil, nil, true)
  redis.call('DEL', hold)
  return { job or nil }
end

local function note_rate(claimed)
  local rate = $rate .. pool
  local seen = redis.call('HMGET', rate, 'at', 'count')
  local count = tonumber(seen[2] or 0) * math.exp((tonumber(seen[1] or now) - now) / 30000)
  redis.call('HSET', rate, 'at', now, 'count', string.format('%.6g', count + claimed))
  redis.call('PEXPIRE', rate, $rate_ms)
end

local function fill(held)
  local jobs, guard = {}, 0
  while free_rows > 0 and guard < 1024 do
    guard = guard + 1
    local stream, class, tenant = next_stream()
    if not stream then return jobs, false end
    local job = serve(stream, class, tenant, #held == 0 and #jobs == 0)
    if job == false then return jobs, true end  -- skipping the head would starve long prompts
    if job then jobs[#jobs + 1] = job end
  end
  return jobs, next_stream() ~= nil
end

local jobs = repeated()
if jobs then return jobs end
local held = redis.call('HKEYS', own)
local more = false
jobs = solo(held)
if not jobs then jobs, more = fill(held) end
if #jobs == 0 then return jobs end

local ids = nonce
for _, job in ipairs(jobs) do ids = ids .. ' ' .. job[1] end
redis.call('SET', $lastclaim .. worker, ids, 'PX', $rate_ms)
redis.call('PEXPIRE', own, $slack_ms)
redis.call('PEXPIRE', $touched .. worker, $slack_ms)
note_rate(#jobs)
if more then ring(pool) end
return jobs
