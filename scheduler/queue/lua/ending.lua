-- Ends of an attempt and of a job: letting go of it, sealing its log, handing its outcome to the recorder.

-- The worker's side of a running job goes: pending entry, ownership, a cancel that nobody needs to hear any more.
local function release(id, job)
  local stream = stream_of(job)
  redis.pcall('XACK', stream, $group, job.sid)
  drop_entry(stream, job.sid)
  redis.call('HDEL', $own .. job.worker, id)
  redis.call('SREM', $cancels .. job.worker, id)
end

-- The job becomes terminal: last event, outcome to the recorder, TTLs. The caller took it out of queue or worker.
-- `final`: state, payload, code, message; `keep_ms`: how long its hash and log stay readable. A durable job's stay
-- until the recorder releases them, and, where it did not succeed, its body for a retry by hand.
local function seal(id, job, now, final, keep_ms)
  local hash, log = $job .. id, $log .. id
  local durable = job.durable == '1'
  if durable then keep_ms = math.max(keep_ms, $durable_keep_ms) end
  local last = job.attempt .. '-4294967295'
  redis.call('HSET', hash, 'state', final.state, 'finished', now)
  if final.code and final.code ~= '' then
    redis.call('HSET', hash, 'code', final.code, 'message', final.message or '')
  else
    redis.call('HDEL', hash, 'code', 'message')
  end
  redis.call('HDEL', hash, 'sid', 'lane', 'cancel')
  redis.call('XADD', log, last, 'p', final.payload)
  redis.call('PUBLISH', $channel .. id, last .. ' ' .. final.payload)
  redis.call('PEXPIRE', log, keep_ms)
  redis.call('PEXPIRE', hash, keep_ms)
  if durable and final.state ~= 'succeeded' then
    redis.call('PEXPIRE', $body .. id, $dead_ms)
  else
    redis.call('DEL', $body .. id)
  end
  redis.call('ZREM', $deadlines, id)
  redis.call('ZREM', $live, id)
  redis.call('HINCRBY', $count, final.state, 1)
  redis.call('XADD', $done, 'MAXLEN', '~', $done_maxlen, '*', 'id', id, unpack(redis.call('HGETALL', hash)))
end

-- A failed job that ran out of attempts: kept with its body for a day, and listed.
local function bury(id, job, now, final, keep_ms)
  local body = redis.call('GET', $body .. id)
  seal(id, job, now, final, keep_ms)
  if body then redis.call('SET', $body .. id, body, 'PX', $dead_ms) end
  redis.call('PEXPIRE', $job .. id, $dead_ms)
  local entry = redis.call('XADD', $dead, 'MAXLEN', '~', $dead_maxlen, '*', 'id', id, 'pool', job.pool,
    'class', job.class, 'tenant', job.tenant, 'attempt', job.attempt, 'code', final.code, 'message', final.message)
  redis.call('HSET', $job .. id, 'dead', entry)
end

-- Whether the job was a listed dead letter.
local function forget_dead_letter(id)
  local entry = redis.call('HGET', $job .. id, 'dead')
  if not entry then return false end
  redis.call('XDEL', $dead, entry)
  redis.call('HDEL', $job .. id, 'dead')
  return true
end

-- A job that may go on elsewhere: back to the ready streams, unless somebody ended it meanwhile.
-- `ends`: payloads and texts of cancelled and expired, as prepared by the caller; `lane`: another than make_ready's.
local function requeue(id, job, now, ends, keep_ms, lane)
  if job.cancel then
    seal(id, job, now, ends[job.cancel], keep_ms)
    return job.cancel
  end
  if job.deadline > 0 and job.deadline <= now then
    seal(id, job, now, ends.expired, keep_ms)
    return 'expired'
  end
  count_depth(job, 1)
  make_ready(id, job, now, lane)
  redis.call('HDEL', $job .. id, 'worker')
  return 'queued'
end

-- Terminal events that no worker writes come ready-made from the client: one (code, message, payload) per end.
local function ends_from(first)
  local ends = {}
  local states = { cancelled = 'cancelled', expired = 'expired', lost = 'failed', timeout = 'expired' }
  for i, name in ipairs({ 'cancelled', 'expired', 'lost', 'timeout' }) do
    local at = first + (i - 1) * 3
    ends[name] = { state = states[name], code = ARGV[at], message = ARGV[at + 1],
      payload = ARGV[at + 2] }
  end
  return ends
end
