-- Writes to keys that many jobs share are gathered, and made once per key: at the script's end, or by `settle` where
-- the script reads such a key again.
local owed = { sums = {}, credits = {}, hash = {}, zset = {}, set = {}, entries = {}, ttls = {}, gone = {} }
local WRITES = { hash = { 'HSET', 'HDEL' }, zset = { 'ZADD', 'ZREM' }, set = { 'SADD', 'SREM' } }

local function page(kind, key)
  local found = owed[kind][key]
  if not found then
    found = {}
    owed[kind][key] = found
  end
  return found
end

-- A hash's count changes; it is removed at 0.
local function add(hash, field, by)
  local sums = page('sums', hash)
  sums[field] = (sums[field] or 0) + by
end

-- A field, member or score of a shared key (`kind`: hash, set or zset) is set, or removed where `value` is false.
local function put(kind, key, member, value)
  page(kind, key)[member] = value
end

local function expire(key, ms)
  owed.ttls[key] = math.max(owed.ttls[key] or 0, ms)
end

-- The key is deleted.
local function delete(key)
  owed.gone[#owed.gone + 1] = key
end

-- Adds to what a job's tenant was charged, wherever its counter is then.
local function credit(job, tokens)
  local credits = page('credits', job.pool .. ':' .. job.class)
  credits[job.tenant] = (credits[job.tenant] or 0) + tokens
end

-- A given job's entry leaves its ready stream and the pending list.
local function give_up_entry(stream, sid)
  local sids = page('entries', stream)
  sids[#sids + 1] = sid
end

local function in_parts(command, list, ...)
  for i = 1, #list, 1000 do
    local part = { unpack(list, i, math.min(i + 999, #list)) }
    for at, word in ipairs({ ... }) do table.insert(part, at, word) end
    redis.call(command, unpack(part))
  end
end

local function settle_members(kind, key, members)
  local kept, gone = {}, {}
  for member, value in pairs(members) do
    if value == false then
      gone[#gone + 1] = member
    elseif kind == 'hash' then
      kept[#kept + 1], kept[#kept + 2] = member, value
    else
      if kind == 'zset' then kept[#kept + 1] = value end
      kept[#kept + 1] = member
    end
  end
  in_parts(WRITES[kind][1], kept, key)
  in_parts(WRITES[kind][2], gone, key)
end

local function settle_sums(hash, sums)
  for field, by in pairs(sums) do
    if by ~= 0 and redis.call('HINCRBY', hash, field, text(by)) <= 0 then redis.call('HDEL', hash, field) end
  end
end

local function settle_credits(queue, credits)
  for tenant, tokens in pairs(credits) do
    local key = $active .. queue
    if not redis.call('ZSCORE', key, tenant) then key = $counters .. queue end
    if redis.call('ZSCORE', key, tenant) then redis.call('ZINCRBY', key, text(tokens), tenant) end
  end
end

local function settle_entries(stream, sids)
  redis.pcall('XACK', stream, $group, unpack(sids))
  redis.call('XDEL', stream, unpack(sids))
  if redis.call('XLEN', stream) == 0 then redis.call('DEL', stream) end
end

local function settle()
  for hash, sums in pairs(owed.sums) do settle_sums(hash, sums) end
  for queue, credits in pairs(owed.credits) do settle_credits(queue, credits) end
  for kind in pairs(WRITES) do
    for key, members in pairs(owed[kind]) do settle_members(kind, key, members) end
  end
  for stream, sids in pairs(owed.entries) do settle_entries(stream, sids) end
  in_parts('DEL', owed.gone)
  for key, ms in pairs(owed.ttls) do redis.call('PEXPIRE', key, text(ms)) end
  for kind in pairs(owed) do owed[kind] = {} end
end
