#!lua flags=allow-oom
-- FORM: move chosen groups from the queue into one batch, all or none.
-- KEYS  1 groups (stream)  2 batches (stream)  3 state (hash)  4 settings (hash)
-- ARGV  1 step to form  2 sequences it must hold  3 number k of groups  4…3+k their ids in `groups`  then the batch's fields and values
-- reply "formed" (now, or by a call whose reply was lost) | "conflict" (another replica was faster: choose again)
--       | "held" (a lossless shadow is behind by as many batches as it may be)
-- `gids` and the totals among the fields were read from the same entries, which never change.
-- Where `formed` is lost or no number of steps, the newest batch tells it. Entries beyond it, written by hand, would have later
-- steps go on from their ids: then the stream is made anew without them.
local k = tonumber(ARGV[3])
local formed = tonumber(redis.call('HGET', KEYS[3], 'formed') or '')
if not formed or formed > 2 ^ 53 then
  local newest = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)[1]
  formed = newest and tonumber(string.match(newest[1], '^%d+')) or 0
  redis.call('HSET', KEYS[3], 'formed', formed)
  if formed + 1 ~= tonumber(ARGV[1]) then return 'conflict' end
end
local kept = redis.call('XRANGE', KEYS[2], ARGV[1] .. '-0', ARGV[1] .. '-0')
if #kept > 0 and table.concat(kept[1][2], '\0') == table.concat({unpack(ARGV, 4 + k)}, '\0') then return 'formed' end

local function step_of(id) return tonumber(string.match(id, '^%d+')) end

local function map(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

local function remake(formed)
  local entries, readers, pending = redis.call('XRANGE', KEYS[2], '-', formed .. '-0'), {}, {}
  for i, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    readers[i] = map(flat)
    local first, slice = '-', nil
    repeat
      slice = redis.call('XPENDING', KEYS[2], readers[i].name, first, formed .. '-0', 1000)
      for _, lent in ipairs(slice) do pending[#pending + 1] = {readers[i].name, unpack(lent)} end
      first = #slice > 0 and '(' .. slice[#slice][1]
    until #slice < 1000
  end
  redis.call('DEL', KEYS[2])
  for _, entry in ipairs(entries) do redis.call('XADD', KEYS[2], entry[1], unpack(entry[2])) end
  for _, reader in ipairs(readers) do
    local last = reader['last-delivered-id']
    redis.call('XGROUP', 'CREATE', KEYS[2], reader.name, step_of(last) > formed and formed .. '-0' or last, 'MKSTREAM')
  end
  for _, lent in ipairs(pending) do
    local name, id, consumer, idle, deliveries = unpack(lent)
    redis.call('XCLAIM', KEYS[2], name, consumer, 0, id, 'IDLE', idle, 'RETRYCOUNT', deliveries, 'FORCE', 'JUSTID')
  end
end

if formed + 1 ~= tonumber(ARGV[1]) then return 'conflict' end
local there = redis.call('EXISTS', KEYS[2]) == 1
if there and step_of(map(redis.call('XINFO', 'STREAM', KEYS[2]))['last-generated-id']) > formed then remake(formed) end
if there then
  for _, reader in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    local policy, at = reader[2], {}
    for i = 1, #reader, 2 do at[reader[i]] = reader[i + 1] end
    local most = string.match(redis.call('HGET', KEYS[4], 'shadow:' .. policy) or '', '^lossless (%d+)$')
    if most then
      local pending, unread = redis.call('XPENDING', KEYS[2], policy), redis.call('XRANGE', KEYS[2], '(' .. at['last-delivered-id'], '+', 'COUNT', 1)
      local oldest = pending[1] > 0 and pending[2] or #unread > 0 and unread[1][1] or ARGV[1]
      if ARGV[1] - tonumber(string.match(oldest, '^%d+')) >= tonumber(most) then return 'held' end
    end
  end
end
local sequences, bytes, taken, quotas, present = 0, 0, {}, {}, {}
for i = 1, k do
  local found = redis.call('XRANGE', KEYS[1], ARGV[3 + i], ARGV[3 + i])
  if #found == 0 then return 'conflict' end
  local entry, flat = {}, found[1][2]
  for j = 1, #flat, 2 do entry[flat[j]] = flat[j + 1] end
  sequences = sequences + tonumber(entry.n)
  bytes = bytes + tonumber(entry.bytes)
  local waiting = 'waiting:' .. entry.env .. ':' .. entry.n
  taken[waiting] = (taken[waiting] or 0) + 1
  for field, amount in pairs({env_sequences = entry.n, env_bytes = entry.bytes}) do
    field = field .. ':' .. entry.env
    quotas[field] = (quotas[field] or 0) + tonumber(amount)
  end
  present['missing:' .. entry.env] = true
end
if sequences ~= tonumber(ARGV[2]) then return 'conflict' end

redis.call('XADD', KEYS[2], ARGV[1] .. '-0', unpack(ARGV, 4 + k))
for i = 1, k do redis.call('XDEL', KEYS[1], ARGV[3 + i]) end
redis.call('HINCRBY', KEYS[3], 'groups', -k)
redis.call('HINCRBY', KEYS[3], 'sequences', -sequences)
redis.call('HINCRBY', KEYS[3], 'bytes', string.format('%.0f', -bytes))
for field, amount in pairs(quotas) do
  if redis.call('HINCRBY', KEYS[3], field, string.format('%.0f', -amount)) == 0 then redis.call('HDEL', KEYS[3], field) end
end
for waiting, groups in pairs(taken) do
  if redis.call('HINCRBY', KEYS[3], waiting, -groups) == 0 then redis.call('HDEL', KEYS[3], waiting) end
end
for missing in pairs(present) do redis.call('HDEL', KEYS[3], missing) end
redis.call('HINCRBY', KEYS[3], 'undelivered_groups', k)
redis.call('HINCRBY', KEYS[3], 'undelivered_sequences', sequences)
redis.call('HINCRBY', KEYS[3], 'kept_bytes', string.format('%.0f', bytes))
redis.call('HSET', KEYS[3], 'formed', ARGV[1])
return 'formed'
