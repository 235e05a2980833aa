-- Ends a job on request: at once where it waits; where it runs, its worker learns of it by its next emit.
-- Returns false for an unknown job, else the state after the call.
local id, keep_ms = ARGV[1], tonumber(ARGV[2])
redis.call('PEXPIRE', $job .. id .. ':none', 0)  -- always allowed, so that the script passes at maxmemory
local job = load_job(id)
if not job then return false end
if job.state == 'queued' or job.state == 'scheduled' then
  leave_queue(id, job)
  seal(id, job, now_ms(), ENDS.cancelled, keep_ms)
  return 'cancelled'
end
if job.state == 'running' then
  redis.call('HSETNX', $job .. id, 'cancel', 'cancelled')
  redis.call('SADD', $cancels .. job.worker, id)
  redis.call('PEXPIRE', $cancels .. job.worker, $slack_ms)
end
return job.state
