#!lua flags=allow-oom
-- VOTE: a replica holds the whole step's gradients. The last vote of the epoch commits: acknowledge the batch, write the
-- ledger, and go on to the next step, all at once.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)  4 batches (stream)
--       5 ledger:<policy> (stream)  6 state (hash)  7 writer:<policy> (string)  8 refused (stream)
--       9 trained (hash)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 digest of the gradients  6 policy (consumer group)
--       7 letters to keep  8 number k of sequences that could not be trained  9…8+8k a letter each (4 fields and values)
--       then the ledger entry's fields and values; the last voter's are written
-- reply "committed" (now, or before with this replica's vote) | "waiting" (for other votes) | "moved" (another epoch)
--       | "closed" (the step is not open) | "fenced" (the replicas don't hold the writer lock) | "diverged" (a vote for other gradients)
--       | "unclaimed" (not all groups are with members, or this one has not the newest weights) | "gone" (the batch is not lent to them)
-- include refused
local step, k = ARGV[4], tonumber(ARGV[8])
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'open', 'step', 'won', 'groups', 'at:' .. ARGV[1])
if found[1] == ARGV[2] and found[4] == step and found[5] == ARGV[3] then return 'committed' end
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return 'moved' end
if found[3] ~= step then return 'closed' end
if redis.call('GET', KEYS[7]) ~= 'replicas-' .. ARGV[2] then return 'fenced' end
if found[7] ~= found[4] then return 'unclaimed' end

local mine, prefix, missing = ARGV[3] .. ':' .. step .. ':' .. ARGV[5], ARGV[3] .. ':' .. step .. ':', false
local members = redis.call('ZRANGE', KEYS[2], 0, -1)
for _, id in ipairs(members) do
  local vote = id == ARGV[1] and mine or redis.call('HGET', KEYS[1], 'vote:' .. id)
  if not vote or string.sub(vote, 1, #prefix) ~= prefix then
    missing = true
  elseif vote ~= mine then
    return 'diverged'
  end
end
if missing then
  redis.call('HSET', KEYS[1], 'vote:' .. ARGV[1], mine)
  return 'waiting'
end

local id = step .. '-0'
local pending = redis.call('XPENDING', KEYS[4], ARGV[6], id, id, 1)
if #pending == 0 or pending[1][2] ~= 'replicas' then return 'gone' end
local newest, last = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1), '0'
if #newest > 0 then last = string.match(newest[1][1], '^%d+') end
if last ~= found[4] then return 'gone' end
local held = redis.call('XPENDING', KEYS[3], 'trainers')
if held[1] ~= tonumber(found[6]) then return 'unclaimed' end
for _, share in ipairs(held[4]) do
  if not redis.call('ZSCORE', KEYS[2], share[1]) then return 'unclaimed' end
end

redis.call('XADD', KEYS[5], id, unpack(ARGV, 9 + 8 * k))
redis.call('XACK', KEYS[4], ARGV[6], id)
local batch = redis.call('XRANGE', KEYS[4], id, id)[1]
for i = 1, batch and #batch[2] or 0, 2 do
  if batch[2][i] == 'gids' then
    for gid in string.gmatch(batch[2][i + 1], '%S+') do redis.call('HSET', KEYS[9], gid, step) end
  end
end
for i = 0, k - 1 do
  redis.call('XADD', KEYS[8], '*', unpack(ARGV, 9 + 8 * i, 16 + 8 * i))
end
if k > 0 then
  redis.call('HINCRBY', KEYS[6], 'untrainable', k)
  trim_letters(KEYS[8], tonumber(ARGV[7]), 0)
end
redis.call('HINCRBY', KEYS[6], 'committed:' .. ARGV[6], 1)
for _, member in ipairs(members) do
  redis.call('HSET', KEYS[1], 'at:' .. member, step)
  redis.call('HDEL', KEYS[1], 'vote:' .. member)
end
for _, share in ipairs(held[4]) do redis.call('HINCRBY', KEYS[1], 'trained:' .. share[1], share[2]) end
redis.call('HSET', KEYS[1], 'step', step, 'won', ARGV[3])
redis.call('HDEL', KEYS[1], 'open', 'groups')
redis.call('DEL', KEYS[3])
return 'committed'
