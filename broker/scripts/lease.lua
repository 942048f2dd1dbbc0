#!lua flags=allow-oom
-- LEASE: lend the consumer one batch: its own unfinished one, else one whose lease lapsed, else the next new one.
-- KEYS  1 batches (stream)  2 state (hash)  3 dead (stream)  4 skipped (hash)  5 settings (hash)
-- ARGV  1 policy (consumer group)  2 consumer  3 milliseconds after which another consumer's lease has lapsed (0: at once)
--       4 how often a batch may be lent, 0 for any number  5 '1' if the batch counts as delivered from now on, '0' if DELIVER will say so
-- reply {gone} | {gone, id, fields, deliveries} (gone: batches passed over by this call)
-- A batch whose entry is gone, deleted by hand, is passed over: its step becomes a hole in the numbers, and is counted as `gone`.
-- An entry beyond the newest step that FORM made was written by hand: it is deleted, and the reader stays where it was.
-- Idempotent: a caller that lost the reply gets the same batch again. Reading it again renews the lease and counts as a
-- delivery. A batch that was lent too often is given up, and the next one lent: the policy goes on without it; and if
-- no other policy has trained it or still may, its groups become dead letters. A lossy shadow that is behind by more batches
-- than it may be skips the oldest of those that it has not read.
local stream, policy, consumer, limit, gone = KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[4]), 0

local formed = tonumber(redis.call('HGET', KEYS[2], 'formed') or '0') or 0
if formed > 2 ^ 53 then formed = 0 end -- by hand, too: FORM makes it anew

local function deliver(step)  -- the same as DELIVER
  local delivered, groups, sequences = (tonumber(redis.call('HGET', KEYS[2], 'delivered') or '0') or 0), 0, 0
  if step <= delivered then return end
  local later = step < formed
  for _, entry in ipairs(later and redis.call('XRANGE', stream, (step + 1) .. '-0', '+') or {}) do
    for j = 1, #entry[2], 2 do
      if entry[2][j] == 'gids' then groups = groups + select(2, string.gsub(entry[2][j + 1], '%S+', '')) end
      if entry[2][j] == 'n' then sequences = sequences + (tonumber(entry[2][j + 1]) or 0) end
    end
  end
  redis.call('HSET', KEYS[2], 'delivered', step, 'undelivered_groups', groups, 'undelivered_sequences', string.format('%.0f', sequences))
end

local function pass_over(id)
  local step = string.match(id, '^%d+')
  redis.call('XACK', stream, policy, id)
  if redis.call('HSETNX', KEYS[4], policy .. ':' .. step, '') == 1 then
    redis.call('HINCRBY', KEYS[2], 'gone', 1)
    gone = gone + 1
  end
end

local function is_foreign(id)
  if formed == 0 or tonumber(string.match(id, '^%d+')) <= formed then return false end
  redis.call('XACK', stream, policy, id)
  redis.call('XDEL', stream, id)
  redis.call('XGROUP', 'SETID', stream, policy, formed .. '-0')
  return true
end

local function lapsed()  -- one call looks at ten pending batches: however many living leases stand before it
  local cursor = '0-0'
  repeat
    local reply = redis.call('XAUTOCLAIM', stream, policy, consumer, ARGV[3], cursor, 'COUNT', 1)
    for _, id in ipairs(reply[3]) do pass_over(id) end
    if reply[2][1] then return reply[2][1] end
    cursor = reply[1]
  until cursor == '0-0'
end

local function lend(id, fields, deliveries)
  if ARGV[5] == '1' then deliver(tonumber(string.match(id, '^%d+'))) end
  return {gone, id, fields, deliveries}
end

local function rule(name) return redis.call('HGET', KEYS[5], 'shadow:' .. name) or '' end

local function give_up(id, fields, deliveries)
  local step, batch, policies, wanted = string.match(id, '^%d+'), {}, {}, false
  for j = 1, #fields, 2 do batch[fields[j]] = fields[j + 1] end
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local name, at = group[2], {}
    for j = 1, #group, 2 do at[group[j]] = group[j + 1] end
    if name ~= 'archive' then policies[#policies + 1] = name end  -- it trains nothing
    local may_skip = string.find(rule(name), '^lossy') and tonumber(string.match(at['last-delivered-id'], '^%d+')) < tonumber(step)
    if name ~= policy and name ~= 'archive' and not may_skip and redis.call('HEXISTS', KEYS[4], name .. ':' .. step) == 0 then
      wanted = true
    end
  end
  local gids = batch.gids or ''
  redis.call('XACK', stream, policy, id)
  redis.call('HSET', KEYS[4], policy .. ':' .. step, gids)
  if wanted then return end
  local detail = 'step ' .. step .. ' was lent ' .. deliveries .. ' times and never committed'
  for gid in string.gmatch(gids, '%S+') do
    redis.call('XADD', KEYS[3], '*', 'gid', gid, 'reason', 'deliveries', 'deliveries', deliveries, 'detail', detail)
    redis.call('HINCRBY', KEYS[2], 'dead', 1)
    redis.call('HINCRBY', KEYS[2], 'dropped:deliveries', 1)
  end
  for _, name in ipairs(policies) do redis.call('HSET', KEYS[4], name .. ':' .. step, '') end
  deliver(tonumber(step))
  redis.call('XDEL', stream, id)
  if (tonumber(batch.bytes or '') or 0) > 0 then redis.call('HINCRBY', KEYS[2], 'kept_bytes', '-' .. batch.bytes) end
end

local function skip(most)
  local oldest = formed - most + 1
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local at = {}
    for j = 1, #group, 2 do at[group[j]] = group[j + 1] end
    local read = tonumber(string.match(at['last-delivered-id'], '^%d+'))
    if at.name == policy and read < oldest - 1 then
      for _, entry in ipairs(redis.call('XRANGE', stream, (read + 1) .. '-0', (oldest - 1) .. '-0')) do
        for j = 1, #entry[2], 2 do
          if entry[2][j] == 'gids' then
            redis.call('HSET', KEYS[4], policy .. ':' .. string.match(entry[1], '^%d+'), entry[2][j + 1])
          end
        end
      end
      redis.call('XGROUP', 'SETID', stream, policy, (oldest - 1) .. '-0')
    end
  end
end

while true do
  local again
  local own = redis.call('XREADGROUP', 'GROUP', policy, consumer, 'COUNT', 1, 'STREAMS', stream, '0')
  if own and #own[1][2] > 0 then
    again = own[1][2][1]
  else
    again = lapsed()
  end
  if again and is_foreign(again[1]) then
    gone = gone + 1
  elseif again and again[2] then
    local deliveries = redis.call('XPENDING', stream, policy, again[1], again[1], 1)[1][4]
    if limit == 0 or deliveries <= limit then return lend(again[1], again[2], deliveries) end
    give_up(again[1], again[2], deliveries - 1)
  elseif again then
    pass_over(again[1])
  else
    break
  end
end

local most = string.match(rule(policy), '^lossy (%d+)$')
if most then skip(tonumber(most)) end
local read = 0
for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local at = {}
  for j = 1, #group, 2 do at[group[j]] = group[j + 1] end
  if at.name == policy then read = tonumber(string.match(at['last-delivered-id'], '^%d+')) end
end
local new
repeat
  new = redis.call('XREADGROUP', 'GROUP', policy, consumer, 'COUNT', 1, 'STREAMS', stream, '>')
until not (new and is_foreign(new[1][2][1][1]))
local first = math.max(read, tonumber(redis.call('HGET', KEYS[2], 'joined:' .. policy) or '0') or 0) + 1
local behind = new and tonumber(string.match(new[1][2][1][1], '^%d+')) or formed + 1
for step = first, behind - 1 do pass_over(step .. '-0') end  -- deleted before anybody read them
if new then return lend(new[1][2][1][1], new[1][2][1][2], 1) end
if read < formed then redis.call('XGROUP', 'SETID', stream, policy, formed .. '-0') end
local delivered = (tonumber(redis.call('HGET', KEYS[2], 'delivered') or '0') or 0)
if delivered < formed and #redis.call('XRANGE', stream, (delivered + 1) .. '-0', '+', 'COUNT', 1) == 0 then
  deliver(formed)  -- none of them will be
end
return {gone}
