#!lua flags=allow-oom
-- RETIRE: free a batch that every reader covers, if the batches kept are more than the run is to keep.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)  4 skipped (hash)  5 trained (hash)
--       6… blob:<gid> of its groups (strings)
-- ARGV  1 step
-- reply "freed" | "gone" (freed before) | "wanted" (some reader does not cover it, or it still counts as queued) | "kept" (within `keep_bytes`)
-- A lossy shadow wants what it has read, and not what it would skip: that is skipped here and now.
-- All in one script, so that a reader that has just subscribed finds a batch whole or not at all.
local step = tonumber(ARGV[1])
local found = redis.call('XRANGE', KEYS[1], step .. '-0', step .. '-0')
if #found == 0 then return 'gone' end
if step > (tonumber(redis.call('HGET', KEYS[2], 'delivered') or '0') or 0) then return 'wanted' end
local formed = (tonumber(redis.call('HGET', KEYS[2], 'formed') or '0') or 0)
local readers, lossy = redis.call('XINFO', 'GROUPS', KEYS[1]), {}
if #readers == 0 then return 'wanted' end
for _, reader in ipairs(readers) do
  local at = {}
  for i = 1, #reader, 2 do at[reader[i]] = reader[i + 1] end
  local covered = tonumber(redis.call('HGET', KEYS[2], 'covered:' .. at.name) or '') or 0
  local most = string.match(redis.call('HGET', KEYS[3], 'shadow:' .. at.name) or '', '^lossy (%d+)$')
  if not most then
    if covered < step then return 'wanted' end
  elseif covered < step then
    local unread = step > tonumber(string.match(at['last-delivered-id'], '^%d+'))
    local skips = step <= formed - tonumber(most)
    local given_up = redis.call('HEXISTS', KEYS[4], at.name .. ':' .. step) == 1
    if not given_up and not (unread and skips) then return 'wanted' end
    if unread then lossy[#lossy + 1] = at.name end
  end
end
local keep = tonumber(redis.call('HGET', KEYS[3], 'keep_bytes') or '') or 0
local kept = (tonumber(redis.call('HGET', KEYS[2], 'kept_bytes') or '0') or 0)
if keep > 0 and kept <= keep then return 'kept' end

for i = 6, #KEYS do redis.call('UNLINK', KEYS[i]) end -- one by one: Lua hands over 8,000 values at most
redis.call('XDEL', KEYS[1], step .. '-0')
for i = 1, #found[1][2], 2 do
  if found[1][2][i] == 'bytes' and tonumber(found[1][2][i + 1]) > 0 then
    redis.call('HINCRBY', KEYS[2], 'kept_bytes', '-' .. found[1][2][i + 1])
  end
  if found[1][2][i] == 'gids' then
    for gid in string.gmatch(found[1][2][i + 1], '%S+') do redis.call('HDEL', KEYS[5], gid) end
    for _, name in ipairs(lossy) do redis.call('HSET', KEYS[4], name .. ':' .. step, found[1][2][i + 1]) end
  end
end
return 'freed'
