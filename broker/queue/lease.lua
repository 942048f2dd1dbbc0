#!lua flags=allow-oom
-- LEASE: lend the consumer one batch: its own unfinished one, else one whose lease lapsed, else the
-- next new one.
-- KEYS  1 batches (stream)  2 state (hash)  3 dead (stream)  4 skipped (hash)  5 settings (hash)
-- ARGV  1 policy (consumer group)  2 consumer
--       3 milliseconds after which another consumer's lease has lapsed (0: at once)
--       4 how often a batch may be lent, 0 for any number
--       5 '1' if the batch counts as delivered from now on, '0' if MARK_DELIVERED will say so
-- reply {gone} | {gone, id, fields, deliveries} (gone: batches passed over by this call)
-- A batch whose entry is gone, deleted by hand, is passed over: its step becomes a hole in the
-- numbers, and is counted as `gone`.
-- An entry beyond the newest step that FORM made was written by hand: it is deleted, and the reader
-- stays where it was.
-- Idempotent: a caller that lost the reply gets the same batch again. Reading it again renews the
-- lease and counts as a delivery. A batch that was lent too often is given up, and the next one
-- lent: the policy goes on without it; and if no other policy has trained it or still may, its
-- groups become dead letters. A lossy shadow that is behind by more batches than it may be skips
-- the oldest of those that it has not read.
--- @include delivered
--- @include readers
local batches, state, dead, skipped, settings = unpack(KEYS)
local policy, consumer, lapse_ms, max_deliveries, counts_now = unpack(ARGV)
local gone = 0

local function number(field) return tonumber(redis.call('HGET', state, field) or '') or 0 end

local formed = number('formed')
if formed > 2 ^ 53 then formed = 0 end -- by hand, too: FORM makes it anew

local function skip_step(reader, step, gids)
  redis.call('HSET', skipped, reader .. ':' .. step, gids)
end

local function pass_over(step)
  redis.call('XACK', batches, policy, step .. '-0')
  if redis.call('HSETNX', skipped, policy .. ':' .. step, '') == 1 then
    redis.call('HINCRBY', state, 'gone', 1)
    gone = gone + 1
  end
end

-- The consumer's oldest unfinished batch (from '0'), or the next new one (from '>').
local function read(from)
  local reply = redis.call('XREADGROUP', 'GROUP', policy, consumer, 'COUNT', 1,
    'STREAMS', batches, from)
  return reply and reply[1][2][1]
end

local function is_foreign(id)
  if formed == 0 or step_of(id) <= formed then return false end
  redis.call('XACK', batches, policy, id)
  redis.call('XDEL', batches, id)
  redis.call('XGROUP', 'SETID', batches, policy, formed .. '-0')
  return true
end

-- One call looks at ten pending batches: however many living leases stand before it.
local function lapsed()
  local cursor = '0-0'
  repeat
    local reply = redis.call('XAUTOCLAIM', batches, policy, consumer, lapse_ms, cursor, 'COUNT', 1)
    for _, id in ipairs(reply[3]) do pass_over(step_of(id)) end
    if reply[2][1] then return reply[2][1] end
    cursor = reply[1]
  until cursor == '0-0'
end

local function lend(id, fields, deliveries)
  if counts_now == '1' then deliver(batches, state, step_of(id)) end
  return {gone, id, fields, deliveries}
end

-- Whether another policy has trained the batch, or still may.
local function is_wanted(step, readers)
  for _, reader in ipairs(readers) do
    local may_skip = shadow_rule(settings, reader.name) == 'lossy' and reader.read < step
    local trains = reader.name ~= policy and reader.name ~= 'archive' and not may_skip
    if trains and redis.call('HEXISTS', skipped, reader.name .. ':' .. step) == 0 then
      return true
    end
  end
  return false
end

local function give_up(id, fields, deliveries)
  local step, batch, readers = step_of(id), map(fields), readers_of(batches)
  redis.call('XACK', batches, policy, id)
  skip_step(policy, step, batch.gids or '')
  if is_wanted(step, readers) then return end
  local detail = 'step ' .. step .. ' was lent ' .. deliveries .. ' times and never committed'
  for gid in each_gid(batch.gids) do
    redis.call('XADD', dead, '*', 'gid', gid, 'reason', 'deliveries', 'deliveries', deliveries,
      'detail', detail)
    redis.call('HINCRBY', state, 'dead', 1)
    redis.call('HINCRBY', state, 'dropped:deliveries', 1)
  end
  for _, reader in ipairs(readers) do -- the archive's trains nothing
    if reader.name ~= 'archive' then skip_step(reader.name, step, '') end
  end
  deliver(batches, state, step)
  redis.call('XDEL', batches, id)
  if (tonumber(batch.bytes or '') or 0) > 0 then
    redis.call('HINCRBY', state, 'kept_bytes', '-' .. batch.bytes)
  end
end

-- The step that the policy was given last.
local function last_read()
  for _, reader in ipairs(readers_of(batches)) do
    if reader.name == policy then return reader.read end
  end
  return 0
end

-- A lossy shadow goes on where it is behind by no more than it may be.
local function skip_old()
  local kind, behind = shadow_rule(settings, policy)
  if kind ~= 'lossy' then return end
  local first, last = last_read() + 1, formed - behind
  if first > last then return end
  for _, entry in ipairs(redis.call('XRANGE', batches, first .. '-0', last .. '-0')) do
    local gids = value_of(entry[2], 'gids')
    if gids then skip_step(policy, step_of(entry[1]), gids) end
  end
  redis.call('XGROUP', 'SETID', batches, policy, last .. '-0')
end

local function lend_again()
  while true do
    local batch = read('0') or lapsed()
    if not batch then return nil end
    local id, fields = batch[1], batch[2]
    if is_foreign(id) then
      gone = gone + 1
    elseif fields then
      local deliveries = redis.call('XPENDING', batches, policy, id, id, 1)[1][4]
      local most = tonumber(max_deliveries)
      if most == 0 or deliveries <= most then return lend(id, fields, deliveries) end
      give_up(id, fields, deliveries - 1)
    else
      pass_over(step_of(id))
    end
  end
end

local function lend_new()
  local last, new = last_read(), nil
  repeat new = read('>') until not (new and is_foreign(new[1]))
  local first = math.max(last, number('joined:' .. policy)) + 1
  local behind = new and step_of(new[1]) or formed + 1
  for step = first, behind - 1 do pass_over(step) end -- deleted before anybody read them
  if new then return lend(new[1], new[2], 1) end
  if last < formed then redis.call('XGROUP', 'SETID', batches, policy, formed .. '-0') end
  local delivered = number('delivered')
  local after = (delivered + 1) .. '-0'
  if delivered < formed and #redis.call('XRANGE', batches, after, '+', 'COUNT', 1) == 0 then
    deliver(batches, state, formed) -- none of them will be
  end
end

local lent = lend_again()
if lent then return lent end
skip_old()
return lend_new() or {gone}
