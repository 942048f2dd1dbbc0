#!lua flags=allow-oom
-- REFIT: take batches apart that can't be trained as they are, move groups that can't be trained to
-- the dead letters, count anew.
-- KEYS  1 groups (stream)  2 batches (stream)  3 state (hash)  4 dead (stream)  5 skipped (hash)
--       6 trainers (hash)
-- ARGV  1 registration that was judged (JSON, '' for none)
--       2 what to note as `fitted`, '' for nothing
--       3 policy (consumer group) that can't train the batches
--       4 number k of batches  5…4+k their steps
--       5+k number d of queued groups, then three for each: its id in `groups`, reason, detail
--       then three for each group of the batches, in order: step, gid, and as a JSON list its queue
--       entry's fields and values, or reason and detail where it can't be queued
-- reply { batches taken apart, groups now dead, entries that could not be read }
--       | nil (another registration: judge again)
-- A batch that another policy has trained stays as it is, and this policy skips it. The steps of
-- the others are holes in the numbers, as those of batches that were given up. Their groups go to
-- the front of the queue. What is not there any more was moved before.
--- @include readers
local groups, batches, state, dead, skipped, trainers = unpack(KEYS)
local judged, fitted, policy, k = unpack(ARGV, 1, 4)
local STEPS = 5
local QUEUED = STEPS + k + 1
local BATCHED = QUEUED + 3 * ARGV[QUEUED - 1]
local taken_apart, died, unreadable = 0, 0, 0

if (redis.call('HGET', trainers, 'config') or '') ~= judged then return nil end
local readers = readers_of(batches)

local function each(stream, call)
  local first = '-'
  while true do
    local slice = redis.call('XRANGE', stream, first, '+', 'COUNT', 500)
    for _, entry in ipairs(slice) do call(entry[1], entry[2]) end
    if #slice < 500 then return end
    first = '(' .. slice[#slice][1]
  end
end

local function make_dead(gid, reason, detail)
  redis.call('XADD', dead, '*', 'gid', gid, 'reason', reason, 'deliveries', 0, 'detail', detail)
  redis.call('HINCRBY', state, 'dead', 1)
  redis.call('HINCRBY', state, 'dropped:' .. reason, 1)
  died = died + 1
end

-- Batches.

local function is_lent(reader, id)
  return #redis.call('XPENDING', batches, reader.name, id, id, 1) > 0
end

local function has_trained(reader, step)
  return reader.name ~= 'archive' and reader.read >= tonumber(step)
    and redis.call('HEXISTS', skipped, reader.name .. ':' .. step) == 0
    and not is_lent(reader, step .. '-0')
end

local function is_trained(step)
  for _, reader in ipairs(readers) do
    if has_trained(reader, step) then return true end
  end
  return false
end

-- The policy goes on without a batch that it would train next, or that is lent to it.
local function skip(reader, id, step, batch)
  local after = '(' .. reader['last-delivered-id']
  local unread = redis.call('XRANGE', batches, after, '+', 'COUNT', 1)[1]
  local is_next = unread and unread[1] == id
  if not is_next and not is_lent(reader, id) then return end
  if is_next then
    redis.call('XGROUP', 'SETID', batches, policy, id)
    reader['last-delivered-id'], reader.read = id, tonumber(step)
  end
  redis.call('XACK', batches, policy, id)
  redis.call('HSET', skipped, policy .. ':' .. step, batch.gids or '')
end

local function take_apart(step)
  local id = step .. '-0'
  local kept = redis.call('XRANGE', batches, id, id)[1]
  if not kept then return false end
  if is_trained(step) then
    for _, reader in ipairs(readers) do
      if reader.name == policy then skip(reader, id, step, map(kept[2])) end
    end
    return false
  end
  redis.call('HSET', skipped, policy .. ':' .. step, '')
  for _, reader in ipairs(readers) do
    redis.call('XACK', batches, reader.name, id)
    if reader.name ~= 'archive' then redis.call('HSET', skipped, reader.name .. ':' .. step, '') end
  end
  redis.call('XDEL', batches, id)
  taken_apart = taken_apart + 1
  return true
end

-- Groups.

-- A stream grows at its end only: what was in it goes behind those that are to be in front.
local function put_in_front(entries)
  if #entries == 0 then return end
  local last = redis.call('XREVRANGE', groups, '+', '-', 'COUNT', 1)[1]
  for _, fields in ipairs(entries) do redis.call('XADD', groups, '*', unpack(fields)) end
  local moving = last ~= nil
  while moving do
    for _, entry in ipairs(redis.call('XRANGE', groups, '-', last[1], 'COUNT', 500)) do
      redis.call('XADD', groups, '*', unpack(entry[2]))
      redis.call('XDEL', groups, entry[1])
      moving = entry[1] ~= last[1]
    end
  end
end

local function is_readable(entry)
  for _, name in ipairs({'n', 'tok', 'bytes'}) do
    if not string.find(entry[name] or '', '^%d+$') then return false end
  end
  for _, name in ipairs({'v_min', 'v_max'}) do
    if not string.find(entry[name] or '', '^%-?%d+$') then return false end
  end
  return tonumber(entry.n) > 0 and (entry.gid or '') ~= ''
    and string.find(entry.env or '', '^@?[%w_.-]+$') ~= nil
end

-- Counters.

local counted = {}
local function add(field, amount) counted[field] = (counted[field] or 0) + amount end

local function count_groups()
  for _, field in ipairs({'groups', 'sequences', 'bytes'}) do add(field, 0) end
  local broken = {}
  each(groups, function(id, fields)
    local entry = map(fields)
    if not is_readable(entry) then
      broken[#broken + 1] = {id = id, gid = entry.gid or '', text = table.concat(fields, ' ')}
      return
    end
    add('groups', 1)
    add('sequences', tonumber(entry.n))
    add('bytes', tonumber(entry.bytes))
    add('env_sequences:' .. entry.env, tonumber(entry.n))
    add('env_bytes:' .. entry.env, tonumber(entry.bytes))
    add('waiting:' .. entry.env .. ':' .. string.format('%.0f', entry.n), 1)
  end)
  return broken
end

local function take_out(broken)
  for _, entry in ipairs(broken) do
    redis.call('XDEL', groups, entry.id)
    unreadable = unreadable + 1
    if entry.gid ~= '' then
      local detail = 'its entry in the queue was: ' .. string.sub(entry.text, 1, 500)
      make_dead(entry.gid, 'unreadable', detail)
    end
  end
end

local function count_batches(delivered)
  for _, field in ipairs({'kept_bytes', 'undelivered_groups', 'undelivered_sequences'}) do
    add(field, 0)
  end
  each(batches, function(id, fields)
    local batch = map(fields)
    add('kept_bytes', tonumber(batch.bytes or '') or 0)
    if step_of(id) > delivered then
      add('undelivered_groups', select(2, string.gsub(batch.gids or '', '%S+', '')))
      add('undelivered_sequences', tonumber(batch.n or '') or 0)
    end
  end)
end

local function write_counters()
  for _, field in ipairs(redis.call('HKEYS', state)) do
    local is_of_env = string.find(field, '^waiting:') or string.find(field, '^env_')
    if is_of_env and not counted[field] then redis.call('HDEL', state, field) end
  end
  for field, value in pairs(counted) do
    if value == 0 then
      redis.call('HDEL', state, field)
    else
      redis.call('HSET', state, field, string.format('%.0f', value))
    end
  end
end

local free, front = {}, {}
for i = STEPS, QUEUED - 2 do free[ARGV[i]] = take_apart(ARGV[i]) end
for i = QUEUED, BATCHED - 1, 3 do
  local id, reason, detail = unpack(ARGV, i, i + 2)
  local entry = redis.call('XRANGE', groups, id, id)[1]
  if entry and redis.call('XDEL', groups, id) == 1 then
    make_dead(map(entry[2]).gid or '', reason, detail)
  end
end
for i = BATCHED, #ARGV, 3 do
  local step, gid, json = unpack(ARGV, i, i + 2)
  if free[step] then
    local fields = cjson.decode(json)
    if #fields > 2 then front[#front + 1] = fields else make_dead(gid, fields[1], fields[2]) end
  end
end
put_in_front(front)
take_out(count_groups())

local formed = tonumber(redis.call('HGET', state, 'formed') or '0')
local delivered = tonumber(redis.call('HGET', state, 'delivered') or '0')
count_batches(delivered)
-- where nobody was given them, no step passed
if counted.undelivered_groups == 0 and delivered < formed then
  redis.call('HSET', state, 'delivered', formed)
  if redis.call('EXISTS', trainers) == 1 then
    redis.call('HINCRBY', trainers, 'step_offset', delivered - formed)
  end
end
write_counters()
if fitted ~= '' then redis.call('HSET', state, 'fitted', fitted) end
return {taken_apart, died, unreadable}
