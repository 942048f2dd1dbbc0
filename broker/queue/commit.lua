#!lua flags=allow-oom
-- COMMIT: the batch has been trained: acknowledge it and write the ledger, once, and only for who holds it.
-- KEYS  1 batches (stream)  2 ledger:<policy> (stream)  3 state (hash)  4 writer:<policy> (string)  5 refused (stream)
--       6 trained (hash)
-- ARGV  1 policy (consumer group)  2 consumer  3 step  4 writer token, '' for a consumer without one
--       5 letters to keep  6 number k of sequences that could not be trained  7…6+8k a letter each (4 fields and values)
--       then the ledger entry's fields and values
-- reply "committed" | "already" (by this consumer: the ledger says whose batch a step was) | "fenced" (another writer) | "stolen" (another consumer) | "gone" (nobody holds it)
-- include refused
-- XACK alone does not check ownership, so this does. Steps of several HTTP trainers may finish out of order: a late
-- one gets the id <newest step>-<k>; the field `step` is what counts.
local batches, ledger, policy, step = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[3])
local id = step .. '-0'
if ARGV[4] ~= '' and redis.call('GET', KEYS[4]) ~= ARGV[4] then return 'fenced' end
local pending = redis.call('XPENDING', batches, policy, id, id, 1)
if #pending == 0 then
  local function whose(fields)
    local entry = {}
    for i = 1, #fields, 2 do entry[fields[i]] = fields[i + 1] end
    if (entry.consumer or entry.replica) == ARGV[2] then return 'already' end
    return 'stolen'
  end
  local found = redis.call('XRANGE', ledger, id, id)[1]
  if found then return whose(found[2]) end
  for _, late in ipairs(redis.call('XREVRANGE', ledger, '+', id, 'COUNT', 100)) do
    for field = 1, #late[2], 2 do
      if late[2][field] == 'step' and late[2][field + 1] == ARGV[3] then return whose(late[2]) end
    end
  end
  return 'gone'
end
if pending[1][2] ~= ARGV[2] then return 'stolen' end
if #redis.call('XREVRANGE', batches, id, id) == 0 then return 'gone' end

local newest = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)
local entry = id
if #newest > 0 then
  local last = tonumber(string.match(newest[1][1], '^%d+'))
  if last >= step then entry = last .. '-*' end
end
local k = tonumber(ARGV[6])
redis.call('XADD', ledger, entry, 'consumer', ARGV[2], unpack(ARGV, 7 + 8 * k))
redis.call('XACK', batches, policy, id)
local batch = redis.call('XRANGE', batches, id, id)[1]
for i = 1, batch and #batch[2] or 0, 2 do
  if batch[2][i] == 'gids' then
    for gid in string.gmatch(batch[2][i + 1], '%S+') do redis.call('HSET', KEYS[6], gid, step) end
  end
end
for i = 0, k - 1 do
  redis.call('XADD', KEYS[5], '*', unpack(ARGV, 7 + 8 * i, 14 + 8 * i))
end
if k > 0 then
  redis.call('HINCRBY', KEYS[3], 'untrainable', k)
  trim_letters(KEYS[5], tonumber(ARGV[5]), 0)
end
redis.call('HINCRBY', KEYS[3], 'committed:' .. policy, 1)
return 'committed'
