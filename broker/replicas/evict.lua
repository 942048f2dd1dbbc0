#!lua flags=allow-oom
-- EVICT: take away the replicas that are silent for too long, or that go. The others meet anew, in
-- the next epoch.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 beats:<policy> (sorted set)
--       4 writer:<policy> (string)  5 control (stream)
-- ARGV  1 milliseconds of silence that are too long  2 '1' if those that go now do so for good
--       3… pairs: an id, its own limit (0: it goes now)
-- reply number evicted
-- Where the last one goes for good, the writer lock is free: nobody is waited for.
-- What an evicted one had claimed is claimed by others; its gradients count for nothing.
--- @include log_event
--- @include now
local replicas, members, beats, writer, control = unpack(KEYS)
local silent_ms, for_good = tonumber(ARGV[1]), ARGV[2] == '1'
local limits = {}
for i = 3, #ARGV, 2 do limits[ARGV[i]] = tonumber(ARGV[i + 1]) end

-- Those to take away, each with the reason; and how many of them go by themselves.
local function find_gone()
  local gone, leaving, now = {}, 0, now_ms()
  for _, id in ipairs(redis.call('ZRANGE', members, 0, -1)) do
    local silent = now - tonumber(redis.call('ZSCORE', beats, id) or '0')
    local limit = limits[id] or silent_ms
    if limit == 0 then
      leaving = leaving + 1
      gone[#gone + 1] = {id = id, why = 'it left'}
    elseif silent > limit then
      gone[#gone + 1] = {id = id, why = 'silent for ' .. silent .. ' ms'}
    end
  end
  return gone, leaving
end

local gone, leaving = find_gone()
if #gone == 0 then return 0 end

local epoch = redis.call('HINCRBY', replicas, 'epoch', 1)
for _, one in ipairs(gone) do
  redis.call('ZREM', members, one.id)
  redis.call('ZREM', beats, one.id)
  for _, field in ipairs({'at:', 'vote:', 'trained:', 'since:'}) do
    redis.call('HDEL', replicas, field .. one.id)
  end
  local detail = one.why .. ', epoch ' .. epoch
  log_event(control, 'event', 'evicted', 'who', one.id, 'detail', detail)
end
local all_left = for_good and leaving == #gone and redis.call('ZCARD', members) == 0
local token = 'replicas-' .. (redis.call('HGET', replicas, 'generation') or '')
if all_left and redis.call('GET', writer) == token then redis.call('DEL', writer) end
return #gone
