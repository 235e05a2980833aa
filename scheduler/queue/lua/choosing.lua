-- Who is next for a worker (`asker`, see starting.lua): lanes before classes, classes by stride, tenants by least
-- service, FIFO inside. A found piece of work is {stream, sid, id}, with `class` and `tenant` where it is charged.

local PARKED = {}
for _, class in ipairs(CLASSES) do PARKED[class] = 'parked:' .. class end

-- The lanes beside the classes are mostly empty: one look at all of them.
local function look_at_lanes(asker)
  local pool = asker.pool
  local keys = { resume = lane_stream(pool, 'resume'), solo = lane_stream(pool, 'solo'), urgent = $urgent .. pool,
    paused = $paused }
  for _, class in ipairs(CLASSES) do keys[PARKED[class]] = lane_stream(pool, PARKED[class]) end
  asker.lanes, asker.paused = {}, {}
  local names, list = {}, {}
  for name, key in pairs(keys) do names[#names + 1], list[#list + 1] = name, key end
  if redis.call('EXISTS', unpack(list)) == 0 then return end
  for i, name in ipairs(names) do asker.lanes[name] = redis.call('EXISTS', list[i]) == 1 end
  if not asker.lanes.paused then return end
  local flags = redis.call('HMGET', $paused, pool .. '|*', pool .. '|high', pool .. '|normal', pool .. '|low',
    pool .. '|batch')
  asker.paused.all = flags[1]
  for i, class in ipairs(CLASSES) do asker.paused[class] = flags[i + 1] end
end

local function in_lane(asker, lane)
  if not asker.lanes[lane] then return nil end
  local stream = lane_stream(asker.pool, lane)
  local sid, id = peek(asker, stream)
  if sid then return { stream = stream, sid = sid, id = id } end
  asker.lanes[lane] = false
end

local function held(asker)
  if not asker.held then asker.held = redis.call('HKEYS', asker.own) end
  return asker.held
end

local function held_urgent_rows(asker)
  local rows = 0
  for _, id in ipairs(held(asker)) do
    local job = load_job(id)
    if job and job.lane == 'urgent' then rows = rows + rows_of(asker, job) end
  end
  return rows
end

-- The queued job whose deadline comes first, where it comes soon; at most half of a worker's rows are given this way.
local function in_haste(asker)
  if not asker.lanes.urgent then return nil end
  local soon = redis.call('ZRANGEBYSCORE', $urgent .. asker.pool, '(' .. asker.now,
    '(' .. asker.now + asker.urgent_slack, 'LIMIT', 0, 16)
  if #soon > 0 and not asker.urgent_rows then asker.urgent_rows = held_urgent_rows(asker) end
  for _, id in ipairs(soon) do
    local job = load_job(id)
    if not (job and job.state == 'queued' and WEIGHT[job.lane]) then
      redis.call('ZREM', $urgent .. asker.pool, id)
    elseif not asker.paused[job.class] then
      if asker.urgent_rows + rows_of(asker, job) > math.max(1, math.floor(asker.total_rows / 2)) then return nil end
      return { stream = stream_of(job), sid = job.sid, id = id, class = job.class, tenant = job.tenant, urgent = true }
    end
  end
end

-- Batch work waits while the KV cache is well used, until the other classes got a whole cache's worth ahead of it.
local function is_held_back(asker, reached, pass)
  if asker.total_kv <= 0 or asker.total_kv - asker.kv < asker.kv_threshold * asker.total_kv then return false end
  if reached - pass >= asker.total_kv then return false end
  asker.holds_back = true
  return true
end

local function in_class(asker, class, least)
  local parked = in_lane(asker, PARKED[class])
  if parked then return parked end
  local sid, id = peek(asker, least.stream)
  return { stream = least.stream, sid = sid, id = id, class = class, tenant = least.tenant }
end

local function load_passes(asker)
  local seen = redis.call('HMGET', $passes .. asker.pool, 'now', unpack(CLASSES))
  asker.passes = { now = tonumber(seen[1] or 0) }
  for i, class in ipairs(CLASSES) do asker.passes[class] = tonumber(seen[i + 1] or 0) end
end

local function save_passes(asker)
  local fields = { 'now', string.format('%.17g', asker.passes.now) }
  for class in pairs(asker.charged) do
    fields[#fields + 1], fields[#fields + 2] = class, string.format('%.17g', asker.passes[class])
  end
  redis.call('HSET', $passes .. asker.pool, unpack(fields))
  expire($passes .. asker.pool, $counter_ms)
end

-- The least served tenant of a class that has work, or false; with how far it may be charged until it is another one.
local function least_served(asker, class)
  if asker.least[class] == nil then
    local first = redis.call('ZRANGE', $active .. asker.pool .. ':' .. class, 0, 1, 'WITHSCORES')
    asker.least[class] = first[1] and { tenant = first[1], owed = 0,
      stream = $queue .. asker.pool .. ':' .. class .. ':' .. first[1],
      slack = first[4] and tonumber(first[4]) - tonumber(first[2]) or math.huge } or false
  end
  return asker.least[class]
end

-- The class with the least pass among those that have work and may go now.
local function by_stride(asker)
  local best, chosen, least
  for _, class in ipairs(CLASSES) do
    local pass, first = asker.passes[class], least_served(asker, class)
    if (first or asker.lanes[PARKED[class]]) and not asker.paused[class] and (not best or pass < best)
      and not (class == 'batch' and is_held_back(asker, asker.passes.now, pass)) then
      best, chosen, least = pass, class, first
    end
  end
  asker.reached = best
  return chosen, least
end

local function next_work(asker)
  local work = in_lane(asker, 'resume') or in_haste(asker)
  if work then return work end
  while true do
    local class, least = by_stride(asker)
    if not class then return nil end
    if least then return in_class(asker, class, least) end
    work = in_lane(asker, PARKED[class])
    if work then return work end  -- else the parked lane is empty but for running jobs: choose anew without it
  end
end
