-- Ready streams: putting a job in, looking at the head, taking one out; class passes and tenant counters.

local ENDED = { succeeded = true, failed = true, cancelled = true, expired = true }
local CLASSES = { 'high', 'normal', 'low', 'batch' }
local WEIGHT = { high = 64, normal = 16, low = 4, batch = 1 }

-- Fields that are not set yet are named in the tables below, so that Lua makes them as large as they will get.

-- What was asked of a job, in one field of its hash, as it never changes: pool, tenant, cost, kv, rows, queue TTL, whether
-- it is durable, batch (or `-`) and model, with spaces between. Written by records.py.
local function read_spec(job, spec)
  local pool, tenant, cost, kv, rows, qttl, durable, batch =
    string.match(spec, '^(%S+) (%S+) (%d+) (%d+) (%d+) (%d+) (%d) (%S+) ')
  job.pool, job.tenant, job.durable, job.batch = pool, tenant, durable == '1', batch
  job.cost, job.kv, job.rows, job.qttl = tonumber(cost), tonumber(kv), tonumber(rows), tonumber(qttl)
end

-- The same of a job that an older version enqueued.
local function read_single(job)
  job.cost, job.kv, job.rows, job.qttl = tonumber(job.cost), tonumber(job.kv), tonumber(job.rows), tonumber(job.qttl)
  job.durable = job.durable == '1'
end

-- A job as a table: what was asked, and the fields of its hash; numbers are 0 and the lane is its class where they are
-- not set. Nil where the job is unknown.
local function load_job(id)
  local flat = redis.call('HGETALL', $job .. id)
  if not flat[1] then return nil end
  local job = { flat = flat, changed = { state = nil, sid = nil, worker = nil, attempt = nil, started = nil,
    finished = nil, ended = nil, prompt = nil, completion = nil, cached = nil },
    attempt = 0, lost = 0, fails = 0, handed = 0, deadline = 0, cancel = nil, state = nil, class = nil, lane = nil,
    sid = nil, worker = nil, started = nil, first = nil, finished = nil, ended = nil, created = nil, spec = nil,
    pool = nil, tenant = nil, cost = nil, kv = nil, rows = nil, qttl = nil, durable = nil, batch = nil }
  for i = 1, #flat, 2 do
    local name, value = flat[i], flat[i + 1]
    job[name] = job[name] and tonumber(value) or value
  end
  if not job.pool and not job.spec then return nil end
  if job.spec then read_spec(job, job.spec) else read_single(job) end
  if not job.lane then job.lane = job.class end
  return job
end

-- A field of a job gets a new value, or goes where there is none; `save` writes it.
local function set(job, name, value)
  job[name] = value
  if value == nil then value = false end
  job.changed[name] = value
end

local words = {}  -- used again for each job
local function save(id, job)
  local count, gone = 0, nil
  for name, value in pairs(job.changed) do
    if value == false then
      gone = gone or {}
      gone[#gone + 1] = name
    else
      words[count + 1], words[count + 2] = name, value
      count = count + 2
    end
  end
  if count > 0 then redis.call('HSET', $job .. id, unpack(words, 1, count)) end
  if gone then redis.call('HDEL', $job .. id, unpack(gone)) end
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
  add(hash, job.pool .. '|' .. job.class, by)
end

local function count_depth(job, by)
  count_in($depth, job, by)
end

-- A job waits for its time, or does so no more.
local function set_due(id, job, at)
  put('zset', $due, id, at or false)
  count_in($scheduled, job, at and 1 or -1)
end

-- A tenant that comes back is lifted to the least served active one, a class to the pool's virtual time:
-- nobody saves up service while idle.
local activated = {}  -- in this script
local function activate(pool, class, tenant)
  if activated[pool .. ':' .. class .. ':' .. tenant] then return end
  activated[pool .. ':' .. class .. ':' .. tenant] = true
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
  activated[pool .. ':' .. class .. ':' .. tenant] = nil
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

-- Wakes a worker with room and, where full ones hold batch work that they could give up for this class, one of them.
local rung = {}  -- in this script
local function ring(pool, class)
  if rung[pool .. '|' .. class] then return end
  rung[pool .. '|' .. class] = true
  redis.call('ZADD', $bell .. pool, 0, 'work')
  redis.call('PEXPIRE', $bell .. pool, $rate_ms)
  if class ~= 'batch' and redis.call('EXISTS', $full .. pool) == 1 then
    redis.call('ZADD', $alarm .. pool, 0, 'work')
    redis.call('PEXPIRE', $alarm .. pool, $rate_ms)
  end
end

local existing = {}  -- ready streams, in this script
local function append(stream, id, keep)
  if not existing[stream] and redis.call('EXISTS', stream) == 0 then
    redis.call('XGROUP', 'CREATE', stream, $group, '0', 'MKSTREAM')
  end
  existing[stream] = true
  expire(stream, keep)
  return redis.call('XADD', stream, '*', 'id', id)
end

-- Makes a job claimable: its class's queue at first, the resume lane once it was claimed, alone after two losses;
-- or the lane that the caller names.
local function make_ready(id, job, now, lane)
  lane = (job.lost >= 2 and 'solo') or lane or (job.attempt > 0 and 'resume') or job.class
  local keep, limit = job.qttl + $slack_ms, now + job.qttl
  set(job, 'state', 'queued')
  if lane ~= job.lane then set(job, 'lane', lane) end
  set(job, 'sid', append(stream_of(job), id, keep))
  save(id, job)
  if WEIGHT[lane] then
    activate(job.pool, lane, job.tenant)
    expire($active .. job.pool .. ':' .. lane, keep)
  end
  if job.attempt > 0 then
    redis.call('PEXPIRE', $job .. id, text(keep))
    redis.call('PEXPIRE', $body .. id, text(keep))
  end
  if job.deadline > 0 then
    if job.deadline < limit then limit = job.deadline end
    if WEIGHT[lane] and job.class ~= 'batch' then
      redis.call('ZADD', $urgent .. job.pool, job.deadline, id)
      expire($urgent .. job.pool, keep)
    end
  end
  put('zset', $deadlines, id, text(limit))
  ring(job.pool, job.class)
end

-- The last entry of a ready stream that a worker was given; nil where there is no such stream.
local function last_given(stream)
  local info = redis.pcall('XINFO', 'GROUPS', stream)
  if info.err or not info[1] then return nil end
  for i = 1, #info[1], 2 do
    if info[1][i] == 'last-delivered-id' then return info[1][i + 1] end
  end
end

-- Entry id and job id of the first entry that no worker was given, or nil.
local function head(stream)
  local last = last_given(stream)
  local entry = last and redis.call('XRANGE', stream, '(' .. last, '+', 'COUNT', 1)[1]
  if entry then return entry[1], entry[2][2] end
end

local function drop_entry(stream, sid)
  redis.call('XDEL', stream, sid)
  if redis.call('XLEN', stream) == 0 then
    redis.call('DEL', stream)
    existing[stream] = nil
  end
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
