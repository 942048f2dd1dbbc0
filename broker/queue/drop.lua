#!lua flags=allow-oom
-- DROP: move queued groups that are too stale to be trained to the dead letters, all in one go.
-- KEYS  1 groups (stream)  2 dead (stream)  3 state (hash)
-- ARGV  1 newest version  2 versions that a group may lie behind it  3… ids in `groups`
-- reply number of groups moved; what is no longer queued, or not stale, stays as it is
local state, stale = KEYS[3], {}
for i = 3, #ARGV do
  local found = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])
  if #found > 0 then
    local entry, flat = {id = ARGV[i]}, found[1][2]
    for j = 1, #flat, 2 do entry[flat[j]] = flat[j + 1] end
    if ARGV[1] - entry.v_min > tonumber(ARGV[2]) then stale[#stale + 1] = entry end
  end
end

for _, entry in ipairs(stale) do
  local detail = 'its oldest tokens are of version ' .. entry.v_min .. ', the newest version is ' .. ARGV[1]
    .. ', and max_lag is ' .. ARGV[2]
  redis.call('XADD', KEYS[2], '*', 'gid', entry.gid, 'reason', 'stale', 'deliveries', 0, 'detail', detail)
  redis.call('XDEL', KEYS[1], entry.id)
  redis.call('HINCRBY', state, 'groups', -1)
  redis.call('HINCRBY', state, 'sequences', '-' .. entry.n)
  redis.call('HINCRBY', state, 'bytes', '-' .. entry.bytes)
  local waiting = 'waiting:' .. entry.env .. ':' .. entry.n
  if redis.call('HINCRBY', state, waiting, -1) == 0 then redis.call('HDEL', state, waiting) end
  for field, amount in pairs({env_sequences = entry.n, env_bytes = entry.bytes}) do
    field = field .. ':' .. entry.env
    if redis.call('HINCRBY', state, field, '-' .. amount) == 0 then redis.call('HDEL', state, field) end
  end
  redis.call('HINCRBY', state, 'dead', 1)
  redis.call('HINCRBY', state, 'dropped:stale', 1)
end
return #stale
