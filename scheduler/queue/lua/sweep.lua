-- Time's work, for any process to call: reaps expired leases, promotes due jobs, ends overdue ones, rings for backlog.
-- Returns false where another sweep was just there, else {graced, workers, queued, dead, promoted, expired, cancelled}.
local interval, ttl = tonumber(ARGV[1]), tonumber(ARGV[2])
local limits = { keep_ms = tonumber(ARGV[3]), max_lost = tonumber(ARGV[4]), max_attempts = tonumber(ARGV[5]) }
redis.call('DEL', $gate .. ':none')  -- always allowed, so that the script passes at maxmemory
local now = now_ms()
local before = tonumber(redis.call('HGET', $sweep, 'at') or now - interval)
if now >= before and now - before < interval * 0.7 then return false end
redis.call('HSET', $sweep, 'at', now)
local did = { graced = 0, workers = 0, queued = 0, dead = 0, promoted = 0, expired = 0, cancelled = 0 }

-- A promoted replica may lack its master's last writes: attempts that others saw would be given again. It goes by
-- another replication id, and remembers its master's; a server that was merely restarted does not.
local function note_failover()
  local info = redis.pcall('INFO', 'replication')
  if type(info) ~= 'string' then return end
  local name, second = string.match(info, 'master_replid:(%w+)'), string.match(info, 'second_repl_offset:(%-?%d+)')
  local known = redis.call('HGET', $sweep, 'replid')
  if known == name then return end
  redis.call('HSET', $sweep, 'replid', name)
  if known and tonumber(second) >= 0 then redis.call('INCR', $epoch) end
end

-- The sweep's own clock skipped: Redis stood still, and no worker could renew. Every lease is extended, at most once
-- since its own renewal (the half in the score marks it), so that a slow sweeper cannot keep the dead alive.
local function grace()
  local leases = redis.call('ZRANGE', $lease, 0, -1, 'WITHSCORES')
  for i = 1, #leases, 2 do
    local expiry = tonumber(leases[i + 1])
    if expiry == math.floor(expiry) then
      redis.call('ZADD', $lease, now + ttl + 0.5, leases[i])
      did.graced = did.graced + 1
    end
  end
end

local function reap_expired()
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', $lease, '-inf', now, 'LIMIT', 0, 8)) do
    local fates = reap(worker, now, limits)
    for fate, count in pairs(fates) do did[fate] = did[fate] + count end
    did.workers = did.workers + 1
  end
end

local function promote()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', $due, '-inf', now, 'LIMIT', 0, 256)) do
    local job = load_job(id)
    if job and job.state == 'scheduled' then
      set_due(id, job, nil)
      make_ready(id, job, now)
      did.promoted = did.promoted + 1
    else
      redis.call('ZREM', $due, id)
    end
  end
end

-- A job with a row in SQL has no client that waits: no queue TTL ends it, and whatever it waits in lives on.
local function wait_on(id, job)
  local keep, limit = job.qttl + $slack_ms, now + job.qttl
  put('zset', $deadlines, id, job.deadline > 0 and math.min(job.deadline, limit) or limit)
  for _, key in ipairs({ $job .. id, $body .. id }) do redis.call('PEXPIRE', key, keep) end
  if job.state ~= 'queued' then return end
  expire(stream_of(job), keep)
  if WEIGHT[job.lane] then expire($active .. job.pool .. ':' .. job.lane, keep) end
  if job.deadline > 0 then expire($urgent .. job.pool, keep) end
end

local function end_overdue()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', $deadlines, '-inf', now, 'LIMIT', 0, 256)) do
    redis.call('ZREM', $deadlines, id)
    local job = load_job(id)
    local late = job and job.deadline > 0 and job.deadline <= now
    if job and (job.state == 'queued' or job.state == 'scheduled') and job.durable and not late then
      wait_on(id, job)
    elseif job and (job.state == 'queued' or job.state == 'scheduled') then
      leave_queue(id, job)
      seal(id, job, now, late and ENDS.expired or ENDS.timeout, limits.keep_ms)
      did.expired = did.expired + 1
    elseif job and job.state == 'running' then
      redis.call('HSETNX', $job .. id, 'cancel', 'expired')
      redis.call('SADD', $cancels .. job.worker, id)
      redis.call('PEXPIRE', $cancels .. job.worker, $slack_ms)
    end
  end
end

-- A bell may be lost with the connection that took it, or go to a worker that cannot serve: ring again.
local function ring_for_backlog()
  for _, field in ipairs(redis.call('HKEYS', $depth)) do
    local pool, class = string.match(field, '^(.*)|(.*)')
    if redis.call('EXISTS', $active .. pool .. ':' .. class, lane_stream(pool, 'resume'), lane_stream(pool, 'solo'),
      lane_stream(pool, 'parked:' .. class)) > 0 then
      ring(pool, class)
    end
  end
end

-- Above 80 % of maxmemory the batch class is refused, above 90 % all but high; running work goes on.
local function gate()
  local info = redis.pcall('INFO', 'memory')
  if type(info) ~= 'string' then return end  -- a shared server may forbid it
  local used, most = string.match(info, 'used_memory:(%d+)'), tonumber(string.match(info, 'maxmemory:(%d+)'))
  local share = most > 0 and tonumber(used) / most or 0
  if share < 0.8 then return redis.call('DEL', $gate) end
  redis.call('SET', $gate, share < 0.9 and 'batch' or 'normal', 'PX', $gate_ms)
end

-- A live job's hash can only vanish by its TTL or by hand; its place in the listing goes with it.
local function prune_live()
  local oldest = redis.call('ZRANGE', $live, 0, 0)[1]
  if oldest and redis.call('EXISTS', $job .. oldest) == 0 then redis.call('ZREM', $live, oldest) end
end

note_failover()
if now - before > math.max(ttl / 2, interval * 2) then grace() end
reap_expired()
promote()
settle()
end_overdue()
settle()
ring_for_backlog()
gate()
prune_live()
return { did.graced, did.workers, did.queued, did.dead, did.promoted, did.expired, did.cancelled }
