-- Ends of an attempt and of a job: letting go of it, sealing its log, handing its outcome to the recorder.

-- Ends that no worker writes, by why: state, code, message and terminal event (see endings.py).
local ENDS = $ends

-- The worker's side of a running job goes: pending entry, ownership, a cancel that nobody needs to hear any more.
local function release(id, job)
  give_up_entry(stream_of(job), job.sid)
  put('hash', $own .. job.worker, id, false)
  put('set', $cancels .. job.worker, id, false)
end

-- The job becomes terminal: last event, outcome to the recorder, TTLs. The caller took it out of queue or worker.
-- `final`: state, payload, code, message; `keep_ms`: how long its hash and log stay readable. A durable job's stay
-- until the recorder releases them. Where it did not succeed, or `keeps_body`, the body stays for a retry by hand.
local function seal(id, job, now, final, keep_ms, keeps_body)
  local hash, log = $job .. id, $log .. id
  local durable, failed = job.durable, (final.code or '') ~= ''
  if durable then keep_ms = math.max(keep_ms, $durable_keep_ms) end
  local last = job.attempt .. '-4294967295'
  set(job, 'state', final.state)
  set(job, 'finished', text(now))
  if failed then
    set(job, 'code', final.code)
    set(job, 'message', final.message or '')
  elseif job.code then  -- of an earlier try
    set(job, 'code', nil)
    set(job, 'message', nil)
  end
  if job.cancel then set(job, 'cancel', nil) end
  save(id, job)
  redis.call('XADD', log, last, 'p', final.payload)
  redis.call('PUBLISH', $channel .. id, last .. ' ' .. final.payload)
  redis.call('PEXPIRE', log, text(keep_ms))
  redis.call('PEXPIRE', hash, text(keep_ms))
  if keeps_body or durable and final.state ~= 'succeeded' then
    redis.call('PEXPIRE', $body .. id, $dead_ms)
  else
    delete($body .. id)
  end
  put('zset', $deadlines, id, false)
  put('zset', $live, id, false)
  add($count, final.state, 1)
  redis.call('XADD', $done, 'MAXLEN', '~', $done_maxlen, '*', 'id', id, 'job', cmsgpack.pack({ job.flat, job.changed }))
end

-- A failed job that ran out of attempts: kept with its body for a day, and listed.
local function bury(id, job, now, final, keep_ms)
  seal(id, job, now, final, keep_ms, true)
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
-- `lane`: another than make_ready's.
local function requeue(id, job, now, keep_ms, lane)
  if job.cancel then
    local why = job.cancel
    seal(id, job, now, ENDS[why], keep_ms)
    return why
  end
  if job.deadline > 0 and job.deadline <= now then
    seal(id, job, now, ENDS.expired, keep_ms)
    return 'expired'
  end
  count_depth(job, 1)
  set(job, 'worker', nil)
  make_ready(id, job, now, lane)
  return 'queued'
end
