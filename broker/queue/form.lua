#!lua flags=allow-oom
-- FORM: move chosen groups from the queue into one batch, all or none.
-- KEYS  1 groups (stream)  2 batches (stream)  3 state (hash)  4 settings (hash)
-- ARGV  1 step to form  2 sequences it must hold  3 number k of groups
--       4…3+k their ids in `groups`  then the batch's fields and values
-- reply "formed" (now, or by a call whose reply was lost)
--       | "conflict" (another replica was faster: choose again)
--       | "held" (a lossless shadow is behind by as many batches as it may be)
-- `gids` and the totals among the fields were read from the same entries, which never change.
-- Where `formed` is lost or no number of steps, the newest batch tells it. Entries beyond it,
-- written by hand, would have later steps go on from their ids: then the stream is made anew
-- without them.
--- @include counters
--- @include readers
local groups, batches, state, settings = unpack(KEYS)
local step, size, k = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local FIRST, BATCH = 4, 4 + k

local function is_formed()
  local kept = redis.call('XRANGE', batches, step .. '-0', step .. '-0')[1]
  return kept and table.concat(kept[2], '\0') == table.concat({unpack(ARGV, BATCH)}, '\0')
end

-- The first step that a reader has not settled: one lent to it, the next it will read, or this one.
local function oldest_of(reader)
  local pending = redis.call('XPENDING', batches, reader.name)
  if pending[1] > 0 then return step_of(pending[2]) end
  local after = '(' .. reader['last-delivered-id']
  local unread = redis.call('XRANGE', batches, after, '+', 'COUNT', 1)[1]
  return unread and step_of(unread[1]) or tonumber(step)
end

local function is_held()
  for _, reader in ipairs(readers_of(batches)) do
    local kind, behind = shadow_rule(settings, reader.name)
    if kind == 'lossless' and step - oldest_of(reader) >= behind then return true end
  end
  return false
end

-- The newest step that there is, which is kept as the newest formed.
local function restore_formed()
  local newest = redis.call('XREVRANGE', batches, '+', '-', 'COUNT', 1)[1]
  local formed = newest and step_of(newest[1]) or 0
  redis.call('HSET', state, 'formed', formed)
  return formed
end

-- Make the stream anew without the entries beyond `formed`; its readers keep what they were lent.
local function remake(formed)
  local last = formed .. '-0'
  local entries, readers, pending = redis.call('XRANGE', batches, '-', last), {}, {}
  for i, flat in ipairs(redis.call('XINFO', 'GROUPS', batches)) do
    readers[i] = map(flat)
    local first, slice = '-', nil
    repeat
      slice = redis.call('XPENDING', batches, readers[i].name, first, last, 1000)
      for _, lent in ipairs(slice) do pending[#pending + 1] = {readers[i].name, unpack(lent)} end
      first = #slice > 0 and '(' .. slice[#slice][1]
    until #slice < 1000
  end
  redis.call('DEL', batches)
  for _, entry in ipairs(entries) do redis.call('XADD', batches, entry[1], unpack(entry[2])) end
  for _, reader in ipairs(readers) do
    local read = reader['last-delivered-id']
    if step_of(read) > formed then read = last end
    redis.call('XGROUP', 'CREATE', batches, reader.name, read, 'MKSTREAM')
  end
  for _, lent in ipairs(pending) do
    local name, id, consumer, idle, deliveries = unpack(lent)
    redis.call('XCLAIM', batches, name, consumer, 0, id, 'IDLE', idle, 'RETRYCOUNT', deliveries,
      'FORCE', 'JUSTID')
  end
end

local function has_foreign(formed)
  if redis.call('EXISTS', batches) == 0 then return false end
  return step_of(map(redis.call('XINFO', 'STREAM', batches))['last-generated-id']) > formed
end

local function count_in(sums, counter, amount) sums[counter] = (sums[counter] or 0) + amount end

local formed = tonumber(redis.call('HGET', state, 'formed') or '')
if not formed or formed > 2 ^ 53 then
  formed = restore_formed()
  if formed + 1 ~= tonumber(step) then return 'conflict' end
end
if is_formed() then return 'formed' end
if formed + 1 ~= tonumber(step) then return 'conflict' end
if has_foreign(formed) then remake(formed) end
if is_held() then return 'held' end
local sequences, bytes, of_envs, present = 0, 0, {}, {}
for i = FIRST, BATCH - 1 do
  local found = redis.call('XRANGE', groups, ARGV[i], ARGV[i])[1]
  if not found then return 'conflict' end
  local entry = map(found[2])
  sequences = sequences + tonumber(entry.n)
  bytes = bytes + tonumber(entry.bytes)
  count_in(of_envs, 'waiting:' .. entry.env .. ':' .. entry.n, 1)
  count_in(of_envs, 'env_sequences:' .. entry.env, tonumber(entry.n))
  count_in(of_envs, 'env_bytes:' .. entry.env, tonumber(entry.bytes))
  present['missing:' .. entry.env] = true
end
if sequences ~= size then return 'conflict' end

redis.call('XADD', batches, step .. '-0', unpack(ARGV, BATCH))
for i = FIRST, BATCH - 1 do redis.call('XDEL', groups, ARGV[i]) end
take_from_queue(state, k, sequences, bytes)
for counter, amount in pairs(of_envs) do take_from_env(state, counter, amount) end
for missing in pairs(present) do redis.call('HDEL', state, missing) end
redis.call('HINCRBY', state, 'undelivered_groups', k)
redis.call('HINCRBY', state, 'undelivered_sequences', sequences)
redis.call('HINCRBY', state, 'kept_bytes', string.format('%.0f', bytes))
redis.call('HSET', state, 'formed', step)
return 'formed'
