#!lua flags=allow-oom
-- COMMIT: the batch has been trained: acknowledge it and write the ledger, once, and only for who
-- holds it.
-- KEYS  1 batches (stream)  2 ledger:<policy> (stream)  3 state (hash)  4 writer:<policy> (string)
--       5 refused (stream)  6 trained (hash)
-- ARGV  1 policy (consumer group)  2 consumer  3 step
--       4 writer token, '' for a consumer without one
--       5 letters to keep  6 number k of sequences that could not be trained
--       7…6+8k a letter each (4 fields and values)  then the ledger entry's fields and values
-- reply "committed" | "already" (by this consumer: the ledger says whose batch a step was)
--       | "fenced" (another writer) | "stolen" (another consumer) | "gone" (nobody holds it)
-- XACK alone does not check ownership, so this does. Steps of several HTTP trainers may finish out
-- of order: a late one gets the id <newest step>-<k>; the field `step` is what counts.
--- @include entries
--- @include ledger
local batches, ledger, state, writer, refused, trained = unpack(KEYS)
local policy, consumer, step, token = unpack(ARGV, 1, 4)
local letters_kept, k = tonumber(ARGV[5]), tonumber(ARGV[6])
local LETTERS, ENTRY = 7, 7 + 8 * k
local id = step .. '-0'

-- The ledger's entry of the step; one that was finished late is among the next ones.
local function find_entry()
  local found = redis.call('XRANGE', ledger, id, id)[1]
  if found then return map(found[2]) end
  for _, late in ipairs(redis.call('XREVRANGE', ledger, '+', id, 'COUNT', 100)) do
    if value_of(late[2], 'step') == step then return map(late[2]) end
  end
end

local function next_id()
  local newest = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)[1]
  local last = newest and step_of(newest[1]) or 0
  return last >= tonumber(step) and last .. '-*' or id
end

if token ~= '' and redis.call('GET', writer) ~= token then return 'fenced' end
local pending = redis.call('XPENDING', batches, policy, id, id, 1)[1]
if not pending then
  local entry = find_entry()
  if not entry then return 'gone' end
  return (entry.consumer or entry.replica) == consumer and 'already' or 'stolen'
end
if pending[2] ~= consumer then return 'stolen' end
local batch = redis.call('XRANGE', batches, id, id)[1]
if not batch then return 'gone' end

redis.call('XADD', ledger, next_id(), 'consumer', consumer, unpack(ARGV, ENTRY))
acknowledge(batches, state, trained, policy, step, batch)
note_untrainable(refused, state, k, LETTERS, letters_kept)
return 'committed'
