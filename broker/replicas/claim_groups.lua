#!lua flags=allow-oom
-- CLAIM_GROUPS: take the next groups of the open step, or, once all are taken, those of replicas
-- that are gone.
-- KEYS  1 replicas:<policy> (hash)  2 members:<policy> (sorted set)  3 work:<policy> (stream)
-- ARGV  1 id  2 generation  3 epoch  4 step  5 how many  6 how many of this step it has already
-- reply { "claimed", left, place, gid, place, gid, … } (left: groups that no living replica has
--         yet)
--       | { "done" } (living replicas have them all) | { "moved" } (another epoch)
--       | { "closed" } (another step is open, or none)
-- A caller that has fewer than Redis knows of lost a reply: it gets all of its own again.
--- @include fence
local replicas, members, work = unpack(KEYS)
local id, generation, epoch, step, count, held = unpack(ARGV)

-- Groups that living replicas have; those that this one has; and a replica that is gone and had
-- some.
local function read_claims()
  local living, mine, orphaned = 0, 0, nil
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', work, 'trainers')) do
    local name, pending = consumer[2], consumer[4]
    if redis.call('ZSCORE', members, name) then
      living = living + pending
    elseif pending > 0 then
      orphaned = name
    end
    if name == id then mine = pending end
  end
  return living, mine, orphaned
end

-- Groups of this replica's own (from '0'), or new ones (from '>'); nil where there are none.
local function read(most, from)
  local reply = redis.call('XREADGROUP', 'GROUP', 'trainers', id, 'COUNT', most,
    'STREAMS', work, from)
  return reply and reply[1][2]
end

local function take_over(orphaned)
  local taken = {}
  for _, lent in ipairs(redis.call('XPENDING', work, 'trainers', '-', '+', count, orphaned)) do
    taken[#taken + 1] = redis.call('XCLAIM', work, 'trainers', id, 0, lent[1])[1]
  end
  return taken
end

local function claimed(groups, left)
  local reply = {'claimed', left}
  for _, group in ipairs(groups) do
    reply[#reply + 1] = tonumber(string.match(group[1], '%d+$'))
    reply[#reply + 1] = group[2][2]
  end
  return reply
end

if not is_current(replicas, members, id, generation, epoch) then return {'moved'} end
if redis.call('HGET', replicas, 'open') ~= step then return {'closed'} end
local living, mine, orphaned = read_claims()
local left = redis.call('XLEN', work) - living
if mine > tonumber(held) then return claimed(read(mine, '0'), left) end
local groups = read(count, '>') or orphaned and take_over(orphaned)
if not groups then return {'done'} end
return claimed(groups, left - #groups)
