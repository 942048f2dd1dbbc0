#!lua flags=allow-oom
-- CLAIM_GROUPS: take the next groups of the open step, or, once all are taken, those of replicas that are gone.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 how many  6 how many of this step it has already
-- reply { "claimed", left, place, gid, place, gid, … } (left: groups that no living replica has yet)
--       | { "done" } (living replicas have them all) | { "moved" } (another epoch) | { "closed" } (another step is open, or none)
-- A caller that has fewer than Redis knows of lost a reply: it gets all of its own again.
local found = redis.call('HMGET', KEYS[1], 'generation', 'epoch', 'open')
if found[1] ~= ARGV[2] or found[2] ~= ARGV[3] or not redis.call('ZSCORE', KEYS[2], ARGV[1]) then return {'moved'} end
if found[3] ~= ARGV[4] then return {'closed'} end

local held, mine, orphaned = 0, 0, nil
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[3], 'trainers')) do
  local name, pending = consumer[2], consumer[4]
  if redis.call('ZSCORE', KEYS[2], name) then held = held + pending elseif pending > 0 then orphaned = name end
  if name == ARGV[1] then mine = pending end
end

local function claimed(entries, new)
  local reply = {'claimed', redis.call('XLEN', KEYS[3]) - held - new}
  for _, entry in ipairs(entries) do
    reply[#reply + 1] = tonumber(string.match(entry[1], '%d+$'))
    reply[#reply + 1] = entry[2][2]
  end
  return reply
end

local function read(count, from)
  return redis.call('XREADGROUP', 'GROUP', 'trainers', ARGV[1], 'COUNT', count, 'STREAMS', KEYS[3], from)
end

if mine > tonumber(ARGV[6]) then return claimed(read(mine, '0')[1][2], 0) end
local new = read(ARGV[5], '>')
if new then return claimed(new[1][2], #new[1][2]) end
if not orphaned then return {'done'} end
local taken = {}
for _, entry in ipairs(redis.call('XPENDING', KEYS[3], 'trainers', '-', '+', ARGV[5], orphaned)) do
  taken[#taken + 1] = redis.call('XCLAIM', KEYS[3], 'trainers', ARGV[1], 0, entry[1])[1]
end
return claimed(taken, #taken)
