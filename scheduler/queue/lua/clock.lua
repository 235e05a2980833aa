-- Names and time. KEYS[1] is the shard's prefix `sw:{p}:`; every key below is built from it, so all share its slot.
local P = KEYS[1]

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A whole number as Redis is told of it. Redis would format it each time anew, and many jobs are told the same one.
local texts = {}
local function text(number)
  local known = texts[number]
  if not known then
    known = string.format('%.0f', number)
    texts[number] = known
  end
  return known
end
