#!lua flags=allow-oom
-- RESET: forget a run's queue, batches, ledgers, dead letters, registrations and counters, with the
-- groups' data, all at once.
-- KEYS  1 groups (stream)  2 batches (stream)  3 dead (stream)  4… further keys to delete
-- ARGV  1 prefix of the run's keys
--       2 what stands between the id of a post and what tells its groups apart
--       3 milliseconds since 1970: groups trained before then are remembered by no `seen` mark any
--       more
--       4… names of the keys that each policy has, less the policy; the first one's is its ledger
-- reply number of keys deleted
-- The keys of groups and policies are named by what is in the streams: whatever is put at the same
-- time is in there, or comes after.
--- @include readers
local groups, batches, dead = unpack(KEYS, 1, 3)
local prefix, again, marked_after = ARGV[1], ARGV[2], tonumber(ARGV[3])
local OF_POLICY = 4
local deleted, doomed = 0, {}

local function flush()
  if #doomed > 0 then deleted = deleted + redis.call('UNLINK', unpack(doomed)) end
  doomed = {}
end

local function delete(key)
  doomed[#doomed + 1] = key
  if #doomed == 1000 then flush() end
end

local function forget(gids)
  for gid in each_gid(gids) do
    delete(prefix .. 'blob:' .. gid)
    delete(prefix .. 'seen:' .. gid)
    local post_ends = string.find(gid, again, 1, true)
    if post_ends then delete(prefix .. 'seen:' .. string.sub(gid, 1, post_ends - 1)) end
  end
end

local function each(stream, call)
  local first = '-'
  while true do
    local slice = redis.call('XRANGE', stream, first, '+', 'COUNT', 500)
    for _, entry in ipairs(slice) do call(map(entry[2])) end
    if #slice < 500 then return end
    first = '(' .. slice[#slice][1]
  end
end

for _, stream in ipairs({groups, batches, dead}) do
  each(stream, function(entry) forget(entry.gid or entry.gids) end)
end
for _, reader in ipairs(readers_of(batches)) do
  each(prefix .. ARGV[OF_POLICY] .. reader.name, function(entry)
    local at = tonumber(entry.at or '')
    if not at or at == 0 or at * 1000 > marked_after then forget(entry.gids) end
  end)
  for i = OF_POLICY, #ARGV do delete(prefix .. ARGV[i] .. reader.name) end
end
for _, key in ipairs(KEYS) do delete(key) end
flush()
return deleted
