-- Ready streams as one claim sees them: read ahead in growing pages, and given to the worker in one go per stream.

local function reading(asker, stream)
  local one = asker.readings[stream]
  if not one then
    one = { last = last_given(stream), entries = {}, at = 1, size = 2 }
    asker.readings[stream] = one
  end
  return one
end

-- Entry id and job id of the first entry that was not given to this worker nor to another, or nil.
local function peek(asker, stream)
  local one = reading(asker, stream)
  if not one.last then return nil end
  if one.at > #one.entries then
    one.entries, one.at = redis.call('XRANGE', stream, '(' .. one.last, '+', 'COUNT', one.size), 1
    one.size = math.min(4 * one.size, 64)
  end
  local entry = one.entries[one.at]
  if entry then return entry[1], entry[2][2] end
end

-- Past the entry that `peek` showed.
local function step(asker, stream)
  local one = reading(asker, stream)
  one.last = one.entries[one.at][1]
  one.at = one.at + 1
end

-- The stream was changed beyond what `peek` showed.
local function look_again(asker, stream)
  reading(asker, stream).entries = {}
end

-- The entries that were stepped over are the stream's next ones, so reading as many makes them pending.
local function give_all(asker)
  local streams = {}
  for stream, count in pairs(asker.given) do
    redis.call('XREADGROUP', 'GROUP', $group, asker.worker, 'COUNT', count, 'STREAMS', stream, '>')
    streams[#streams + 1] = stream
  end
  in_parts('SADD', streams, $touched .. asker.worker)
  expire($touched .. asker.worker, $slack_ms)
end
