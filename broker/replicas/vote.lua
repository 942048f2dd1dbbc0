#!lua flags=allow-oom
-- VOTE: a replica holds the whole step's gradients. The last vote of the epoch commits: acknowledge
-- the batch, write the ledger, and go on to the next step, all at once.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)
--       4 batches (stream)  5 ledger:<policy> (stream)  6 state (hash)  7 writer:<policy> (string)
--       8 refused (stream)  9 trained (hash)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 digest of the gradients  6 policy (consumer group)
--       7 letters to keep  8 number k of sequences that could not be trained
--       9…8+8k a letter each (4 fields and values)
--       then the ledger entry's fields and values; the last voter's are written
-- reply "committed" (now, or before with this replica's vote) | "waiting" (for other votes)
--       | "moved" (another epoch) | "closed" (the step is not open)
--       | "fenced" (the replicas don't hold the writer lock)
--       | "diverged" (a vote for other gradients)
--       | "unclaimed" (not all groups are with members, or this one has not the newest weights)
--       | "gone" (the batch is not lent to them)
--- @include entries
--- @include fence
--- @include ledger
local replicas, members, work, batches, ledger, state, writer, refused, trained = unpack(KEYS)
local id, generation, epoch, step, digest, policy = unpack(ARGV, 1, 6)
local letters_kept, k = tonumber(ARGV[7]), tonumber(ARGV[8])
local LETTERS, ENTRY = 9, 9 + 8 * k
local round = epoch .. ':' .. step .. ':'
local mine = round .. digest
local living = redis.call('ZRANGE', members, 0, -1)

-- What the votes of the living say: 'diverged', 'waiting', or nil where all agree with this one.
local function judge_votes()
  local missing = false
  for _, member in ipairs(living) do
    local vote = member == id and mine or redis.call('HGET', replicas, 'vote:' .. member)
    if not vote or string.sub(vote, 1, #round) ~= round then
      missing = true
    elseif vote ~= mine then
      return 'diverged'
    end
  end
  return missing and 'waiting' or nil
end

local function newest_trained()
  local newest = redis.call('XREVRANGE', ledger, '+', '-', 'COUNT', 1)[1]
  return newest and string.match(newest[1], '^%d+') or '0'
end

-- How many groups each replica has claimed, as Redis replies it; nil unless members have them all.
local function read_claims(groups)
  local claimed = redis.call('XPENDING', work, 'trainers')
  if claimed[1] ~= tonumber(groups) then return nil end
  for _, share in ipairs(claimed[4]) do
    if not redis.call('ZSCORE', members, share[1]) then return nil end
  end
  return claimed[4]
end

local function field(name) return redis.call('HGET', replicas, name) end

local done = field('step')
local is_newest_generation = field('generation') == generation
if is_newest_generation and done == step and field('won') == epoch then return 'committed' end
if not is_current(replicas, members, id, generation, epoch) then return 'moved' end
if field('open') ~= step then return 'closed' end
if redis.call('GET', writer) ~= 'replicas-' .. generation then return 'fenced' end
if field('at:' .. id) ~= done then return 'unclaimed' end
local verdict = judge_votes()
if verdict == 'waiting' then redis.call('HSET', replicas, 'vote:' .. id, mine) end
if verdict then return verdict end
if not is_lent_to_replicas(batches, policy, step) or newest_trained() ~= done then return 'gone' end
local claims = read_claims(field('groups'))
if not claims then return 'unclaimed' end

redis.call('XADD', ledger, step .. '-0', unpack(ARGV, ENTRY))
local batch = redis.call('XRANGE', batches, step .. '-0', step .. '-0')[1]
acknowledge(batches, state, trained, policy, step, batch)
note_untrainable(refused, state, k, LETTERS, letters_kept)
for _, member in ipairs(living) do
  redis.call('HSET', replicas, 'at:' .. member, step)
  redis.call('HDEL', replicas, 'vote:' .. member)
end
for _, share in ipairs(claims) do
  redis.call('HINCRBY', replicas, 'trained:' .. share[1], share[2])
end
redis.call('HSET', replicas, 'step', step, 'won', epoch)
redis.call('HDEL', replicas, 'open', 'groups')
redis.call('DEL', work)
return 'committed'
