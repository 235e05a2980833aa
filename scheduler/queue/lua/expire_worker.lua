-- A worker's engine died: its lease ends now. Returns how many of its jobs were lost.
local worker = ARGV[1]
redis.call('PEXPIRE', $own .. worker, $slack_ms)  -- always allowed, so that the script passes at maxmemory
local fates = reap(worker, now_ms(),
  { keep_ms = tonumber(ARGV[2]), max_lost = tonumber(ARGV[3]), max_attempts = tonumber(ARGV[4]) })
return fates.queued + fates.cancelled + fates.expired + fates.dead
