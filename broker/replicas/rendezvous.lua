#!lua flags=allow-oom
-- RENDEZVOUS: be here for this epoch, until all replicas are; then all know each other and the step
-- that each one's weights are at.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 meeting:<policy> (hash)
-- ARGV  1 id  2 generation  3 epoch
-- reply { "met", step, id, at, id, at, … } in the order in which they joined | { "waiting" }
--       | { "moved" } (another epoch)
-- None of those steps changes before all have met: a commit needs everyone's vote in this epoch.
--- @include fence
local replicas, members, meeting = unpack(KEYS)
local id, generation, epoch = unpack(ARGV)
if not is_current(replicas, members, id, generation, epoch) then return {'moved'} end

if redis.call('HGET', meeting, 'epoch') ~= epoch then redis.call('DEL', meeting) end
redis.call('HSET', meeting, 'epoch', epoch, 'here:' .. id, 1)
local reply = {'met', tonumber(redis.call('HGET', replicas, 'step'))}
for _, member in ipairs(redis.call('ZRANGE', members, 0, -1)) do
  if redis.call('HEXISTS', meeting, 'here:' .. member) == 0 then return {'waiting'} end
  reply[#reply + 1] = member
  reply[#reply + 1] = tonumber(redis.call('HGET', replicas, 'at:' .. member))
end
return reply
