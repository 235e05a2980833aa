-- A worker gives a job back: it goes on elsewhere, and neither losses nor failures count it. ARGV[5] '1': it made room
-- for a higher class, so the job goes first when its own class is served next.
local worker, id, attempt, keep_ms, preempted = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5] == '1'
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local mark = worker .. ' ' .. attempt
if redis.call('HGET', $own .. worker, id) ~= attempt then
  return redis.call('HGET', $job .. id, 'ended') == mark and 1 or 0
end
local job = load_job(id)
if not job then return 0 end
release(id, job)
set(job, 'ended', mark)
set(job, 'handed', job.handed + 1)
requeue(id, job, now_ms(), keep_ms, preempted and 'parked:' .. job.class or nil)
return 1
