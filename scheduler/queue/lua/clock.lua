-- Names and time. KEYS[1] is the shard's prefix `sw:{p}:`; every key below is built from it, so all share its slot.
local P = KEYS[1]

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
