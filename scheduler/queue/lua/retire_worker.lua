-- A worker leaves cleanly: what it still holds is handed back, its lease and its traces go. Returns how many it held.
local worker, keep_ms = ARGV[1], tonumber(ARGV[2])
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local now, held = now_ms(), held_jobs(worker)
for _, one in ipairs(held) do
  release(one.id, one.job)
  set(one.job, 'ended', worker .. ' ' .. one.job.attempt)
  set(one.job, 'handed', one.job.handed + 1)
  requeue(one.id, one.job, now, keep_ms)
end
forget_worker(worker)
return #held
