-- Giving a job to a worker. `asker`: the claim as a table, with the worker's id, its pool and the room that it has left.

local function describe(id, job)
  return { id, job.attempt, redis.call('GET', $body .. id) or '', job.class, job.tenant, job.rows, job.lost,
    job.deadline, job.fails }
end

local function rows_of(asker, job)
  return math.min(job.rows, asker.total_rows)
end

local function fits(asker, job)
  return rows_of(asker, job) <= asker.rows and (asker.idle or job.kv <= asker.kv)
end

local function charge(job)
  local passes, cost = $passes .. job.pool, math.max(1, job.cost)
  local pass = tonumber(redis.call('HGET', passes, job.class) or 0)
  redis.call('HSET', passes, 'now', string.format('%.17g', pass), job.class,
    string.format('%.17g', pass + cost / WEIGHT[job.class]))
  redis.call('PEXPIRE', passes, $counter_ms)
  redis.call('ZINCRBY', $active .. job.pool .. ':' .. job.class, cost, job.tenant)
end

-- After a failover the counter may have gone back: attempts of another epoch start above all that were seen before.
local function next_attempt(asker, job)
  if not asker.epoch then asker.epoch = tonumber(redis.call('GET', $epoch) or 0) end
  return math.max(job.attempt, asker.epoch * 1000) + 1
end

local function start(asker, id, job)
  local hash, log, now = $job .. id, $log .. id, asker.now
  local keep = job.qttl + $slack_ms
  job.attempt = next_attempt(asker, job)
  local first = job.attempt .. '-0'
  local payload = cmsgpack.pack({ type = 'started', worker = asker.worker, at_ms = now })
  redis.call('HSET', hash, 'state', 'running', 'lane', job.lane, 'sid', job.sid, 'attempt', job.attempt,
    'worker', asker.worker, 'a:' .. job.attempt, now .. ' ' .. asker.worker)
  redis.call('HSETNX', hash, 'started', now)
  redis.call('HDEL', hash, 'a:' .. (job.attempt - 16))
  redis.call('HSET', asker.own, id, job.attempt)
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

-- An urgent job leaves the middle of its class's stream, and gets its pending entry in the urgent one.
local function move_to_urgent(id, job, stream)
  drop_entry(stream, job.sid)
  job.lane = 'urgent'
  job.sid = append(stream_of(job), id, job.qttl + $slack_ms)
end

-- `work`: as choosing.lua found it. Work with a class is charged to it and to its tenant; the other lanes were charged
-- when their jobs were claimed first.
local function take(asker, work, job)
  if work.class then charge(job) end
  if job.deadline > 0 then redis.call('ZREM', $urgent .. job.pool, work.id) end
  if work.urgent then move_to_urgent(work.id, job, work.stream) end
  local stream = stream_of(job)
  redis.call('XREADGROUP', 'GROUP', $group, asker.worker, 'COUNT', 1, 'STREAMS', stream, '>')
  redis.call('SADD', $touched .. asker.worker, stream)
  count_depth(job, -1)
  start(asker, work.id, job)
  asker.rows = asker.rows - rows_of(asker, job)
  asker.kv = asker.kv - job.kv
  asker.idle = false
  if work.urgent then asker.urgent_rows = asker.urgent_rows + rows_of(asker, job) end
  asker.claims[job.class] = (asker.claims[job.class] or 0) + 1
  asker.jobs[#asker.jobs + 1] = describe(work.id, job)
end
