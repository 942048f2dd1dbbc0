#!lua flags=allow-oom
-- OPEN_STEP: lay out the groups of a batch that is lent to a policy's replicas, for each of them to
-- claim.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)
--       4 batches (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 policy (consumer group)
-- reply "opened" | "already" | "moved" (another epoch)
--       | "gone" (the batch is committed, or not lent to the replicas)
-- What was open before is void: its batch was given up, or lent to others.
--- @include entries
--- @include fence
local replicas, members, work, batches = unpack(KEYS)
local id, generation, epoch, step, policy = unpack(ARGV)
if not is_current(replicas, members, id, generation, epoch) then return 'moved' end
if not is_lent_to_replicas(batches, policy, step) then return 'gone' end
if tonumber(step) <= tonumber(redis.call('HGET', replicas, 'step')) then return 'gone' end
if redis.call('HGET', replicas, 'open') == step then return 'already' end
local batch = redis.call('XRANGE', batches, step .. '-0', step .. '-0')[1]
if not batch then return 'gone' end

redis.call('DEL', work)
local groups = 0
for gid in each_gid(value_of(batch[2], 'gids')) do
  redis.call('XADD', work, step .. '-' .. groups, 'gid', gid)
  groups = groups + 1
end
redis.call('XGROUP', 'CREATE', work, 'trainers', '0')
redis.call('HSET', replicas, 'open', step, 'groups', groups)
return 'opened'
