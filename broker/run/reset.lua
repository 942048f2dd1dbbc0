#!lua flags=allow-oom
-- RESET: forget a run's queue, batches, ledgers, dead letters, registrations and counters, with the groups' data, all at once.
-- KEYS  1 groups (stream)  2 batches (stream)  3 dead (stream)  4… further keys to delete
-- ARGV  1 prefix of the run's keys  2 what stands between the id of a post and what tells its groups apart
--       3 milliseconds since 1970: groups trained before then are remembered by no `seen` mark any more
--       4… names of the keys that each policy has, less the policy; the first one's is its ledger
-- reply number of keys deleted
-- The keys of groups and policies are named by what is in the streams: whatever is put at the same time is in there, or comes after.
local prefix, deleted, doomed = ARGV[1], 0, {}

local function flush()
  if #doomed > 0 then deleted = deleted + redis.call('UNLINK', unpack(doomed)) end
  doomed = {}
end

local function delete(key)
  doomed[#doomed + 1] = key
  if #doomed == 1000 then flush() end
end

local function forget(gids)
  for gid in string.gmatch(gids, '%S+') do
    delete(prefix .. 'blob:' .. gid)
    delete(prefix .. 'seen:' .. gid)
    local again = string.find(gid, ARGV[2], 1, true)
    if again then delete(prefix .. 'seen:' .. string.sub(gid, 1, again - 1)) end
  end
end

local function each(stream, call)
  local first = '-'
  while true do
    local slice = redis.call('XRANGE', stream, first, '+', 'COUNT', 500)
    for _, entry in ipairs(slice) do
      local found = {}
      for i = 1, #entry[2], 2 do found[entry[2][i]] = entry[2][i + 1] end
      call(found)
    end
    if #slice < 500 then return end
    first = '(' .. slice[#slice][1]
  end
end

for i = 1, 3 do each(KEYS[i], function(entry) forget(entry.gid or entry.gids or '') end) end
if redis.call('EXISTS', KEYS[2]) == 1 then
  for _, reader in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
    each(prefix .. ARGV[4] .. reader[2], function(entry)
      local at = tonumber(entry.at or '')
      if not at or at == 0 or at * 1000 > tonumber(ARGV[3]) then forget(entry.gids or '') end
    end)
    for i = 4, #ARGV do delete(prefix .. ARGV[i] .. reader[2]) end
  end
end
for _, key in ipairs(KEYS) do delete(key) end
flush()
return deleted
