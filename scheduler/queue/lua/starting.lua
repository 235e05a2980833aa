-- Giving a job to a worker. `asker`: the claim as a table, with the worker's id, its pool and the room that it has left.

-- A claimed job as the worker is told of it; its body is put in by `with_bodies`.
local function describe(id, job)
  return { id, job.attempt, '', job.class, job.tenant, job.rows, job.lost, job.deadline, job.fails }
end

local function with_bodies(jobs)
  if #jobs == 0 then return jobs end
  local keys = {}
  for i, job in ipairs(jobs) do keys[i] = $body .. job[1] end
  for i, body in ipairs(redis.call('MGET', unpack(keys))) do jobs[i][3] = body or '' end
  return jobs
end

local function rows_of(asker, job)
  return math.min(job.rows, asker.total_rows)
end

local function fits(asker, job)
  return rows_of(asker, job) <= asker.rows and (asker.idle or job.kv <= asker.kv)
end

-- Writes what the class's least served tenant was charged, and forgets who it is.
local function settle_charges(asker, class)
  local least = asker.least[class]
  if least and least.owed > 0 then
    redis.call('ZINCRBY', $active .. asker.pool .. ':' .. class, text(least.owed), least.tenant)
  end
  asker.least[class] = nil
end

local function charge(asker, job)
  local pass, cost, least = asker.passes[job.class], math.max(1, job.cost), asker.least[job.class]
  asker.passes.now, asker.passes[job.class], asker.charged[job.class] = pass, pass + cost / WEIGHT[job.class], true
  if least and least.tenant == job.tenant then
    least.owed = least.owed + cost
    if least.owed >= least.slack then settle_charges(asker, job.class) end
  else  -- an urgent job of another tenant
    settle_charges(asker, job.class)
    redis.call('ZINCRBY', $active .. job.pool .. ':' .. job.class, cost, job.tenant)
  end
end

-- After a failover the counter may have gone back: attempts of another epoch start above all that were seen before.
local function next_attempt(asker, job)
  if not asker.epoch then asker.epoch = tonumber(redis.call('GET', $epoch) or 0) end
  return math.max(job.attempt, asker.epoch * 1000) + 1
end

local function start(asker, id, job)
  local log, now = $log .. id, asker.now
  local attempt = next_attempt(asker, job)
  set(job, 'state', 'running')
  set(job, 'attempt', text(attempt))
  set(job, 'worker', asker.worker)
  if not job.started then set(job, 'started', text(now)) end
  set(job, 'a:' .. job.attempt, asker.since)
  if attempt > 16 then set(job, 'a:' .. text(attempt - 16), nil) end
  save(id, job)
  local first = job.attempt .. '-0'
  redis.call('XADD', log, first, 'p', asker.started)
  redis.call('PEXPIRE', log, text(job.qttl + $slack_ms))
  redis.call('PUBLISH', $channel .. id, first .. ' ' .. asker.started)
  put('hash', asker.own, id, job.attempt)
  put('zset', $deadlines, id, job.deadline > 0 and job.deadline)
end

-- An urgent job leaves the middle of its class's stream, and gets its pending entry in the urgent one.
local function move_to_urgent(asker, id, job, stream)
  drop_entry(stream, job.sid)
  look_again(asker, stream)
  set(job, 'lane', 'urgent')
  set(job, 'sid', append(stream_of(job), id, job.qttl + $slack_ms))
end

-- `work`: as choosing.lua found it. Work with a class is charged to it and to its tenant; the other lanes were charged
-- when their jobs were claimed first.
local function take(asker, work, job)
  if work.class then charge(asker, job) end
  if job.deadline > 0 then redis.call('ZREM', $urgent .. job.pool, work.id) end
  if work.urgent then
    move_to_urgent(asker, work.id, job, work.stream)
  else
    step(asker, work.stream)
  end
  local stream = stream_of(job)
  asker.given[stream] = (asker.given[stream] or 0) + 1
  count_depth(job, -1)
  start(asker, work.id, job)
  asker.rows = asker.rows - rows_of(asker, job)
  asker.kv = asker.kv - job.kv
  asker.idle = false
  if work.urgent then asker.urgent_rows = asker.urgent_rows + rows_of(asker, job) end
  asker.claims[job.class] = (asker.claims[job.class] or 0) + 1
  asker.jobs[#asker.jobs + 1] = describe(work.id, job)
end
