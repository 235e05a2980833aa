-- Ready streams: putting a job in, looking at the head, taking one out; class passes and tenant counters.

local FIELDS = { 'state', 'pool', 'class', 'tenant', 'attempt', 'lost', 'fails', 'cost', 'kv', 'rows', 'qttl',
  'deadline', 'lane', 'sid', 'worker', 'cancel', 'handed', 'durable' }
local NUMBERS = { attempt = true, lost = true, fails = true, cost = true, kv = true, rows = true, qttl = true,
  deadline = true, handed = true }
local ENDED = { succeeded = true, failed = true, cancelled = true, expired = true }
local CLASSES = { 'high', 'normal', 'low', 'batch' }
local WEIGHT = { high = 64, normal = 16, low = 4, batch = 1 }

-- The fields that decide about a job, or nil where the job is unknown.
local function load_job(id)
  local values = redis.call('HMGET', $job .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local job = {}
  for i, name in ipairs(FIELDS) do
    local value = values[i] or nil
    job[name] = NUMBERS[name] and tonumber(value or 0) or value
  end
  return job
end

local function lane_stream(pool, lane)
  return $queue .. pool .. ':' .. lane .. ':-'
end

-- A job's lane is its class, or one of the lanes beside the classes, which know no tenants: resume, solo, urgent,
-- parked:<class>.
local function stream_of(job)
  if WEIGHT[job.lane] then return $queue .. job.pool .. ':' .. job.lane .. ':' .. job.tenant end
  return lane_stream(job.pool, job.lane)
end

local function count_in(hash, job, by)
  local field = job.pool .. '|' .. job.class
  if redis.call('HINCRBY', hash, field, by) <= 0 then redis.call('HDEL', hash, field) end
end

local function count_depth(job, by)
  count_in($depth, job, by)
end

-- A job waits for its time, or does so no more.
local function set_due(id, job, at)
  if at then redis.call('ZADD', $due, at, id) else redis.call('ZREM', $due, id) end
  count_in($scheduled, job, at and 1 or -1)
end

-- A tenant that comes back is lifted to the least served active one, a class to the pool's virtual time:
-- nobody saves up service while idle.
local function activate(pool, class, tenant)
  local active, counters, passes = $active .. pool .. ':' .. class, $counters .. pool .. ':' .. class, $passes .. pool
  if redis.call('ZSCORE', active, tenant) then return end
  local least = redis.call('ZRANGE', active, 0, 0, 'WITHSCORES')
  local floor = tonumber(least[2] or redis.call('HGET', passes, 'floor:' .. class) or 0)
  local own = tonumber(redis.call('ZSCORE', counters, tenant) or 0)
  redis.call('ZADD', active, math.max(own, floor), tenant)
  redis.call('ZREM', counters, tenant)
  if least[1] then return end
  local reached = redis.call('HMGET', passes, 'now', class)
  if tonumber(reached[1] or 0) > tonumber(reached[2] or 0) then redis.call('HSET', passes, class, reached[1]) end
end

local function deactivate(pool, class, tenant)
  local active, counters, passes = $active .. pool .. ':' .. class, $counters .. pool .. ':' .. class, $passes .. pool
  local own = redis.call('ZSCORE', active, tenant)
  if not own then return end
  redis.call('ZREM', active, tenant)
  redis.call('ZADD', counters, own, tenant)
  redis.call('PEXPIRE', counters, $counter_ms)
  local least = redis.call('ZRANGE', active, 0, 0, 'WITHSCORES')
  if least[2] then
    redis.call('ZREMRANGEBYSCORE', counters, '-inf', '(' .. least[2])  -- they would be lifted to it anyway
  else
    redis.call('HSET', passes, 'floor:' .. class, own)
    redis.call('PEXPIRE', passes, $counter_ms)
  end
end

-- Adds to what a job's tenant was charged, wherever its counter is now.
local function credit(job, tokens)
  for _, kind in ipairs({ $active, $counters }) do
    local key = kind .. job.pool .. ':' .. job.class
    if redis.call('ZSCORE', key, job.tenant) then return redis.call('ZINCRBY', key, tokens, job.tenant) end
  end
end

-- Wakes a worker with room and, where full ones hold batch work that they could give up for this class, one of them.
local function ring(pool, class)
  redis.call('ZADD', $bell .. pool, 0, 'work')
  redis.call('PEXPIRE', $bell .. pool, $rate_ms)
  if class ~= 'batch' and redis.call('EXISTS', $full .. pool) == 1 then
    redis.call('ZADD', $alarm .. pool, 0, 'work')
    redis.call('PEXPIRE', $alarm .. pool, $rate_ms)
  end
end

local function append(stream, id, keep)
  if redis.call('EXISTS', stream) == 0 then redis.call('XGROUP', 'CREATE', stream, $group, '0', 'MKSTREAM') end
  local sid = redis.call('XADD', stream, '*', 'id', id)
  redis.call('PEXPIRE', stream, keep)
  return sid
end

-- Makes a job claimable: its class's queue at first, the resume lane once it was claimed, alone after two losses;
-- or the lane that the caller names.
local function make_ready(id, job, now, lane)
  job.lane = (job.lost >= 2 and 'solo') or lane or (job.attempt > 0 and 'resume') or job.class
  local keep = job.qttl + $slack_ms
  job.sid = append(stream_of(job), id, keep)
  if WEIGHT[job.lane] then
    activate(job.pool, job.lane, job.tenant)
    redis.call('PEXPIRE', $active .. job.pool .. ':' .. job.lane, keep)
  end
  redis.call('HSET', $job .. id, 'state', 'queued', 'lane', job.lane, 'sid', job.sid)
  local limit = now + job.qttl
  if job.deadline > 0 then
    if job.deadline < limit then limit = job.deadline end
    if WEIGHT[job.lane] and job.class ~= 'batch' then
      redis.call('ZADD', $urgent .. job.pool, job.deadline, id)
      redis.call('PEXPIRE', $urgent .. job.pool, keep)
    end
  end
  redis.call('ZADD', $deadlines, limit, id)
  ring(job.pool, job.class)
end

-- Entry id and job id of the first entry that no worker was given, or nil.
local function head(stream)
  local info = redis.pcall('XINFO', 'GROUPS', stream)
  if info.err or not info[1] then return nil end
  local last
  for i = 1, #info[1], 2 do
    if info[1][i] == 'last-delivered-id' then last = info[1][i + 1] end
  end
  local entry = redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
  if entry then return entry[1], entry[2][2] end
end

local function drop_entry(stream, sid)
  redis.call('XDEL', stream, sid)
  if redis.call('XLEN', stream) == 0 then redis.call('DEL', stream) end
end

-- Takes a waiting job (queued or scheduled) out of whatever it waits in.
local function leave_queue(id, job)
  count_depth(job, -1)
  if job.state == 'scheduled' then return set_due(id, job, nil) end
  local stream = stream_of(job)
  drop_entry(stream, job.sid)
  if job.deadline > 0 then redis.call('ZREM', $urgent .. job.pool, id) end
  if WEIGHT[job.lane] and not head(stream) then deactivate(job.pool, job.lane, job.tenant) end
end
