#!lua flags=allow-oom
-- REFIT: take batches apart that can't be trained as they are, move groups that can't be trained to the dead letters, count anew.
-- KEYS  1 groups (stream)  2 batches (stream)  3 state (hash)  4 dead (stream)  5 skipped (hash)  6 trainers (hash)
-- ARGV  1 registration that was judged (JSON, '' for none)  2 what to note as `fitted`, '' for nothing
--       3 policy (consumer group) that can't train the batches  4 number k of batches  5…4+k their steps
--       5+k number d of queued groups, then three for each: its id in `groups`, reason, detail
--       then three for each group of the batches, in order: step, gid, and as a JSON list its queue entry's fields and values, or
--       reason and detail where it can't be queued
-- reply { batches taken apart, groups now dead, entries that could not be read } | nil (another registration: judge again)
-- A batch that another policy has trained stays as it is, and this policy skips it. The steps of the others are holes in the
-- numbers, as those of batches that were given up. Their groups go to the front of the queue. What is not there any more was
-- moved before.
local groups, batches, state, dead, skipped, trainers = unpack(KEYS)
local policy, taken_apart, died, unreadable = ARGV[3], 0, 0, 0
if (redis.call('HGET', trainers, 'config') or '') ~= ARGV[1] then return nil end

local function map(flat)
  local found = {}
  for i = 1, #flat, 2 do found[flat[i]] = flat[i + 1] end
  return found
end

local function each(stream, first, call)
  while true do
    local slice = redis.call('XRANGE', stream, first, '+', 'COUNT', 500)
    for _, entry in ipairs(slice) do call(entry[1], entry[2]) end
    if #slice < 500 then return end
    first = '(' .. slice[#slice][1]
  end
end

local function bury(gid, reason, detail)
  redis.call('XADD', dead, '*', 'gid', gid, 'reason', reason, 'deliveries', 0, 'detail', detail)
  redis.call('HINCRBY', state, 'dead', 1)
  redis.call('HINCRBY', state, 'dropped:' .. reason, 1)
  died = died + 1
end

local readers = {}
if redis.call('EXISTS', batches) == 1 then
  for _, reader in ipairs(redis.call('XINFO', 'GROUPS', batches)) do readers[#readers + 1] = map(reader) end
end

local function take_apart(step)
  local id = step .. '-0'
  local kept, trained = redis.call('XRANGE', batches, id, id)[1], false
  if not kept then return false end
  for _, reader in ipairs(readers) do
    local read = tonumber(string.match(reader['last-delivered-id'], '^%d+')) >= tonumber(step)
    if read and reader.name ~= 'archive' and redis.call('HEXISTS', skipped, reader.name .. ':' .. step) == 0
        and #redis.call('XPENDING', batches, reader.name, id, id, 1) == 0 then
      trained = true
    end
  end
  if trained then
    for _, reader in ipairs(readers) do
      local unread = redis.call('XRANGE', batches, '(' .. reader['last-delivered-id'], '+', 'COUNT', 1)[1]
      local next_unread = unread and unread[1] == id
      if reader.name == policy and (next_unread or #redis.call('XPENDING', batches, policy, id, id, 1) > 0) then
        if next_unread then
          redis.call('XGROUP', 'SETID', batches, policy, id)
          reader['last-delivered-id'] = id
        end
        redis.call('XACK', batches, policy, id)
        redis.call('HSET', skipped, policy .. ':' .. step, map(kept[2]).gids or '')
      end
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

local at, free, front = 5 + ARGV[4], {}, {}
for i = 5, at - 1 do free[ARGV[i]] = take_apart(ARGV[i]) end
local behind = at + 1 + 3 * ARGV[at]
for i = at + 1, behind - 1, 3 do
  local entry = redis.call('XRANGE', groups, ARGV[i], ARGV[i])[1]
  if entry and redis.call('XDEL', groups, ARGV[i]) == 1 then bury(map(entry[2]).gid or '', ARGV[i + 1], ARGV[i + 2]) end
end
for i = behind, #ARGV, 3 do
  if free[ARGV[i]] then
    local fields = cjson.decode(ARGV[i + 2])
    if #fields > 2 then front[#front + 1] = fields else bury(ARGV[i + 1], fields[1], fields[2]) end
  end
end

if #front > 0 then -- a stream grows at its end only: what was in it goes behind them
  local last = redis.call('XREVRANGE', groups, '+', '-', 'COUNT', 1)[1]
  for _, fields in ipairs(front) do redis.call('XADD', groups, '*', unpack(fields)) end
  local moving = last ~= nil
  while moving do
    for _, entry in ipairs(redis.call('XRANGE', groups, '-', last[1], 'COUNT', 500)) do
      redis.call('XADD', groups, '*', unpack(entry[2]))
      redis.call('XDEL', groups, entry[1])
      moving = entry[1] ~= last[1]
    end
  end
end

local counted, broken = {groups = 0, sequences = 0, bytes = 0}, {}
local function add(field, amount) counted[field] = (counted[field] or 0) + amount end
each(groups, '-', function(id, fields)
  local entry = map(fields)
  local n, bytes = entry.n, entry.bytes
  for _, name in ipairs({'n', 'tok', 'bytes'}) do
    if not string.find(entry[name] or '', '^%d+$') then n = nil end
  end
  for _, name in ipairs({'v_min', 'v_max'}) do
    if not string.find(entry[name] or '', '^%-?%d+$') then n = nil end
  end
  if not n or tonumber(n) == 0 or (entry.gid or '') == '' or not string.find(entry.env or '', '^@?[%w_.-]+$') then
    broken[#broken + 1] = {id, entry.gid or '', table.concat(fields, ' ')}
    return
  end
  add('groups', 1)
  add('sequences', tonumber(n))
  add('bytes', tonumber(bytes))
  add('env_sequences:' .. entry.env, tonumber(n))
  add('env_bytes:' .. entry.env, tonumber(bytes))
  add('waiting:' .. entry.env .. ':' .. string.format('%.0f', n), 1)
end)
for _, entry in ipairs(broken) do
  redis.call('XDEL', groups, entry[1])
  unreadable = unreadable + 1
  if entry[2] ~= '' then bury(entry[2], 'unreadable', 'its entry in the queue was: ' .. string.sub(entry[3], 1, 500)) end
end

local formed, delivered = redis.call('HGET', state, 'formed') or '0', redis.call('HGET', state, 'delivered') or '0'
add('kept_bytes', 0)
add('undelivered_groups', 0)
add('undelivered_sequences', 0)
each(batches, '-', function(id, fields)
  local batch = map(fields)
  add('kept_bytes', tonumber(batch.bytes or '') or 0)
  if tonumber(string.match(id, '^%d+')) > tonumber(delivered) then
    add('undelivered_groups', select(2, string.gsub(batch.gids or '', '%S+', '')))
    add('undelivered_sequences', tonumber(batch.n or '') or 0)
  end
end)
if counted.undelivered_groups == 0 and tonumber(delivered) < tonumber(formed) then -- nobody was given them: no step passed
  redis.call('HSET', state, 'delivered', formed)
  if redis.call('EXISTS', trainers) == 1 then redis.call('HINCRBY', trainers, 'step_offset', delivered - formed) end
end
for _, field in ipairs(redis.call('HKEYS', state)) do
  if string.find(field, '^waiting:') or string.find(field, '^env_') then
    if not counted[field] then redis.call('HDEL', state, field) end
  end
end
for field, value in pairs(counted) do
  if value == 0 then redis.call('HDEL', state, field) else redis.call('HSET', state, field, string.format('%.0f', value)) end
end
if ARGV[2] ~= '' then redis.call('HSET', state, 'fitted', ARGV[2]) end
return {taken_apart, died, unreadable}
