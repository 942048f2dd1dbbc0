#!lua flags=allow-oom
-- OPEN_STEP: lay out the groups of a batch that is lent to a policy's replicas, for each of them to claim.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)  4 batches (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 policy (consumer group)
-- reply "opened" | "already" | "moved" (another epoch) | "gone" (the batch is committed, or not lent to the replicas)
-- What was open before is void: its batch was given up, or lent to others.
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'step', 'open')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 'moved' end
local id, gids = ARGV[4] .. '-0', {}
local pending = redis.call('XPENDING', KEYS[4], ARGV[5], id, id, 1)
if #pending == 0 or pending[1][2] ~= 'replicas' or tonumber(ARGV[4]) <= tonumber(found[3]) then return 'gone' end
if found[4] == ARGV[4] then return 'already' end
local kept = redis.call('XRANGE', KEYS[4], id, id)[1]
if not kept then return 'gone' end
local fields = kept[2]
for i = 1, #fields, 2 do
  if fields[i] == 'gids' then
    for gid in string.gmatch(fields[i + 1], '%S+') do gids[#gids + 1] = gid end
  end
end

redis.call('DEL', KEYS[3])
for i, gid in ipairs(gids) do redis.call('XADD', KEYS[3], ARGV[4] .. '-' .. (i - 1), 'gid', gid) end
redis.call('XGROUP', 'CREATE', KEYS[3], 'trainers', '0')
redis.call('HSET', KEYS[1], 'open', ARGV[4], 'groups', #gids)
return 'opened'
