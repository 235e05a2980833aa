-- What waits and runs, one row per known pool and class; reads only. Each row: pool, class, waiting, scheduled, running,
-- oldest ms (-1: none), paused, draining, claims per s, entries in the pool's urgent, resume and solo lanes, parked.
local now, pools, running = now_ms(), {}, {}

local function known_pools()
  for _, name in ipairs(redis.call('SMEMBERS', $pools)) do pools[name] = true end
  for _, hash in ipairs({ $depth, $paused }) do
    for _, field in ipairs(redis.call('HKEYS', hash)) do pools[string.match(field, '^(.*)|')] = true end
  end
end

local function count_running()
  for _, worker in ipairs(redis.call('ZRANGE', $lease, 0, -1)) do
    for _, id in ipairs(redis.call('HKEYS', $own .. worker)) do
      local job = load_job(id)
      if job then
        local field = job.pool .. '|' .. job.class
        pools[job.pool] = true
        running[field] = (running[field] or 0) + 1
      end
    end
  end
end

-- Entries that no worker was given.
local function size(stream)
  local info = redis.pcall('XINFO', 'GROUPS', stream)
  if info.err or not info[1] then return 0 end
  for i = 1, #info[1], 2 do
    if info[1][i] == 'pending' then return redis.call('XLEN', stream) - info[1][i + 1] end
  end
end

-- Age of the oldest head of the class's tenants; the least served 256 are looked at, and the parked lane.
local function oldest(pool, class)
  local first
  local function look(stream)
    local sid = head(stream)
    local at = sid and tonumber(string.match(sid, '^%d+'))
    if at and (not first or at < first) then first = at end
  end
  for _, tenant in ipairs(redis.call('ZRANGE', $active .. pool .. ':' .. class, 0, 255)) do
    look($queue .. pool .. ':' .. class .. ':' .. tenant)
  end
  look(lane_stream(pool, 'parked:' .. class))
  return first and math.max(0, now - first) or -1
end

local function row(pool, class, lanes, held)
  local field = pool .. '|' .. class
  local waiting = redis.call('HGET', $depth, field) or 0
  local rate = redis.call('HMGET', $rate .. pool, 'at', class)
  local claims = tonumber(rate[2] or 0) * math.exp((tonumber(rate[1] or now) - now) / 30000) / 30
  return { pool, class, waiting, redis.call('HGET', $scheduled, field) or 0, running[field] or 0,
    tonumber(waiting) > 0 and oldest(pool, class) or -1, (held.all or held[class]) and 1 or 0, held.drain and 1 or 0,
    string.format('%.4g', claims), lanes.urgent, lanes.resume, lanes.solo, size(lane_stream(pool, 'parked:' .. class)) }
end

known_pools()
count_running()
local rows = {}
for pool in pairs(pools) do
  local flags = redis.call('HMGET', $paused, pool .. '|*', pool .. '|drain', pool .. '|high', pool .. '|normal',
    pool .. '|low', pool .. '|batch')
  local held = { all = flags[1], drain = flags[2], high = flags[3], normal = flags[4], low = flags[5], batch = flags[6] }
  local lanes = { urgent = redis.call('ZCARD', $urgent .. pool), resume = size(lane_stream(pool, 'resume')),
    solo = size(lane_stream(pool, 'solo')) }
  for _, class in ipairs(CLASSES) do rows[#rows + 1] = row(pool, class, lanes, held) end
end
return rows
