-- Gives a job another class: a waiting one moves to that class's tail, a running one is charged to it from now on.
-- Returns false for an unknown job, else its state.
local id, class = ARGV[1], ARGV[2]
redis.call('PEXPIRE', $job .. id .. ':none', 0)  -- always allowed, so that the script passes at maxmemory
local job = load_job(id)
if not job then return false end
if ENDED[job.state] or job.class == class then return job.state end

-- The queue's TTL runs on; work that was claimed before keeps its place in the resume and solo lanes.
local function move_queued()
  local limit, lane = redis.call('ZSCORE', $deadlines, id), job.lane
  leave_queue(id, job)
  set(job, 'class', class)
  make_ready(id, job, now_ms(), WEIGHT[lane] and class or 'parked:' .. class)
  if limit then put('zset', $deadlines, id, limit) end
  count_depth(job, 1)
end

local function rename()
  local waits, scheduled = job.state ~= 'running', job.state == 'scheduled'
  for by = -1, 1, 2 do
    if waits then count_depth(job, by) end
    if scheduled then count_in($scheduled, job, by) end
    if not waits then credit(job, by * job.cost) end
    set(job, 'class', class)
  end
  set(job, 'lane', job.lane)  -- its entry stays where it is
  save(id, job)
end

if job.state == 'queued' and (WEIGHT[job.lane] or string.find(job.lane, 'parked:', 1, true)) then
  move_queued()
else
  rename()
end
return job.state
