#!lua flags=allow-oom
-- DROP: move queued groups that are too stale to be trained to the dead letters, all in one go.
-- KEYS  1 groups (stream)  2 dead (stream)  3 state (hash)
-- ARGV  1 newest version  2 versions that a group may lie behind it  3… ids in `groups`
-- reply number of groups moved; what is no longer queued, or not stale, stays as it is
--- @include counters
--- @include entries
local groups, dead, state = unpack(KEYS)
local newest, max_lag = unpack(ARGV, 1, 2)
local FIRST = 3

local stale = {}
for i = FIRST, #ARGV do
  local found = redis.call('XRANGE', groups, ARGV[i], ARGV[i])[1]
  local entry = found and map(found[2])
  if entry and newest - entry.v_min > tonumber(max_lag) then
    entry.id = found[1]
    stale[#stale + 1] = entry
  end
end

for _, entry in ipairs(stale) do
  local detail = 'its oldest tokens are of version ' .. entry.v_min .. ', the newest version is '
    .. newest .. ', and max_lag is ' .. max_lag
  redis.call('XADD', dead, '*', 'gid', entry.gid, 'reason', 'stale', 'deliveries', 0,
    'detail', detail)
  redis.call('XDEL', groups, entry.id)
  take_from_queue(state, 1, entry.n, entry.bytes)
  take_from_env(state, 'waiting:' .. entry.env .. ':' .. entry.n, 1)
  take_from_env(state, 'env_sequences:' .. entry.env, entry.n)
  take_from_env(state, 'env_bytes:' .. entry.env, entry.bytes)
  redis.call('HINCRBY', state, 'dead', 1)
  redis.call('HINCRBY', state, 'dropped:stale', 1)
end
return #stale
