-- Accepts jobs, or says why not, each on its own. Reads come first; the first write is one that Redis refuses at
-- maxmemory. ARGV: queue TTL, depth cap, then eleven words per job. Returns for each {'created'|'attached'|'mismatch',
-- job id}, {'full'|'memory', retry after ms} or {'draining'}.
local WORDS = 11
local qttl, cap, now = tonumber(ARGV[1]), tonumber(ARGV[2]), now_ms()
local gate, draining, depths = redis.call('GET', $gate), {}, {}

local hashes, accepted = {}, {}
for i = 3, #ARGV, WORDS do hashes[#hashes + 1] = $job .. ARGV[i] end
local all_new = redis.call('EXISTS', unpack(hashes)) == 0

-- An enqueue whose reply got lost is repeated, perhaps in one call with the first.
local function is_known(id)
  return accepted[id] or not all_new and redis.call('EXISTS', $job .. id) == 1
end

-- A job that answers a repeated request: running or succeeded. One that failed or was cancelled may be tried anew.
local function answers(other)
  local seen = redis.call('HMGET', $job .. other, 'state', 'cancel')
  local state = seen[1]
  return (state == 'queued' or state == 'scheduled' or state == 'running' or state == 'succeeded') and not seen[2]
end

-- Time until a tenth of the class's backlog is gone, from the decayed count of its claims (time constant 30 s).
local function retry_after(pool, class, waiting)
  local seen = redis.call('HMGET', $rate .. pool, 'at', class)
  local count = tonumber(seen[2] or 0) * math.exp((tonumber(seen[1] or now) - now) / 30000)
  if count < 0.01 then return 10000 end
  return math.max(1000, math.min(60000, math.ceil(waiting / 10 / (count / 30000))))
end

local function refusal(pool, class)
  if (gate == 'batch' and class == 'batch') or (gate == 'normal' and class ~= 'high') then return { 'memory', 5000 } end
  if draining[pool] == nil then draining[pool] = redis.call('HEXISTS', $paused, pool .. '|drain') == 1 end
  if draining[pool] then return { 'draining' } end
  local field = pool .. '|' .. class
  if not depths[field] then depths[field] = tonumber(redis.call('HGET', $depth, field) or 0) end
  if depths[field] >= cap then return { 'full', retry_after(pool, class, depths[field]) } end
  depths[field] = depths[field] + 1
end

local function earlier(idem, digest)
  local prior = idem ~= '' and redis.call('GET', $idem .. idem)
  if not prior then return nil end
  local other, seen = string.match(prior, '^(%S+) (.*)')
  if seen ~= digest then return { 'mismatch', other } end
  if answers(other) then return { 'attached', other } end
end

local function accept(id, job, body, wait, made)
  local keep = qttl + wait + $slack_ms
  put('zset', $live, id, made)
  add($count, 'accepted', 1)
  count_depth(job, 1)
  if wait > 0 then
    set(job, 'state', 'scheduled')
    save(id, job)
    set_due(id, job, now + wait)
    if job.deadline > 0 then put('zset', $deadlines, id, job.deadline) end
  else
    make_ready(id, job, now)
  end
  redis.call('PEXPIRE', $job .. id, text(keep))
  redis.call('SET', $body .. id, body, 'PX', text(keep))
end

local function enqueue(id, pool, class, tenant, body, idem, digest, due, wait, made, spec)
  local answer = earlier(idem, digest)
  if answer then return answer end
  if is_known(id) then return { 'created', id } end
  answer = refusal(pool, class)
  if answer then return answer end
  local job = { pool = pool, class = class, lane = class, tenant = tenant, qttl = qttl, deadline = 0, lost = 0,
    attempt = 0, changed = { spec = spec, class = class, created = text(now) } }
  if due ~= '0' then set(job, 'deadline', now + tonumber(due)) end
  accept(id, job, body, tonumber(wait), made)
  accepted[id] = true
  if idem ~= '' then redis.call('SET', $idem .. idem, id .. ' ' .. digest, 'PX', $idem_ms) end
  return { 'created', id }
end

local replies = {}
for i = 3, #ARGV, WORDS do replies[#replies + 1] = enqueue(unpack(ARGV, i, i + WORDS - 1)) end
return replies
