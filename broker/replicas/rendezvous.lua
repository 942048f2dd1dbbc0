#!lua flags=allow-oom
-- RENDEZVOUS: be here for this epoch, until all replicas are; then all know each other and the step that each one's weights are at.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 meeting:<policy> (hash)
-- ARGV  1 id  2 generation  3 epoch
-- reply { "met", step, id, at, id, at, … } in the order in which they joined | { "waiting" } | { "moved" } (another epoch)
-- None of those steps changes before all have met: a commit needs everyone's vote in this epoch.
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'step')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return {'moved'} end
local members, reply = redis.call('ZRANGE', KEYS[2], 0, -1), {'met', tonumber(found[3])}
local fresh = redis.call('HGET', KEYS[3], 'epoch') ~= ARGV[3]

if fresh then redis.call('DEL', KEYS[3]) end
redis.call('HSET', KEYS[3], 'epoch', ARGV[3], 'here:' .. ARGV[1], 1)
for _, id in ipairs(members) do
  if redis.call('HEXISTS', KEYS[3], 'here:' .. id) == 0 then return {'waiting'} end
  reply[#reply + 1] = id
  reply[#reply + 1] = tonumber(redis.call('HGET', KEYS[1], 'at:' .. id))
end
return reply
