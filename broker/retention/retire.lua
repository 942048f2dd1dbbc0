#!lua flags=allow-oom
-- RETIRE: free a batch that every reader covers, if the batches kept are more than the run is to
-- keep.
-- KEYS  1 batches (stream)  2 state (hash)  3 settings (hash)  4 skipped (hash)  5 trained (hash)
--       6… blob:<gid> of its groups (strings)
-- ARGV  1 step
-- reply "freed" | "gone" (freed before)
--       | "wanted" (some reader does not cover it, or it still counts as queued)
--       | "kept" (within `keep_bytes`)
-- A lossy shadow wants what it has read, and not what it would skip: that is skipped here and now.
-- All in one script, so that a reader that has just subscribed finds a batch whole or not at all.
--- @include readers
local batches, state, settings, skipped, trained = unpack(KEYS, 1, 5)
local BLOBS, step = 6, tonumber(ARGV[1])
local id = step .. '-0'

local function number(hash, field) return tonumber(redis.call('HGET', hash, field) or '') or 0 end

-- Whether a lossy shadow, which is behind by no more than so many batches, would still train it.
local function is_wanted_by_lossy(reader, behind)
  if redis.call('HEXISTS', skipped, reader.name .. ':' .. step) == 1 then return false end
  return reader.read >= step or step > number(state, 'formed') - behind
end

-- Whether any reader wants it; and the shadows that pass over it unread.
local function is_wanted(readers)
  local passing = {}
  for _, reader in ipairs(readers) do
    if number(state, 'covered:' .. reader.name) < step then
      local kind, behind = shadow_rule(settings, reader.name)
      if kind ~= 'lossy' or is_wanted_by_lossy(reader, behind) then return true end
      if reader.read < step then passing[#passing + 1] = reader.name end
    end
  end
  return false, passing
end

local found = redis.call('XRANGE', batches, id, id)[1]
if not found then return 'gone' end
if step > number(state, 'delivered') then return 'wanted' end
local readers = readers_of(batches)
if #readers == 0 then return 'wanted' end
local wanted, passing = is_wanted(readers)
if wanted then return 'wanted' end
local keep = number(settings, 'keep_bytes')
if keep > 0 and number(state, 'kept_bytes') <= keep then return 'kept' end

-- one by one: Lua hands over 8,000 values at most
for i = BLOBS, #KEYS do redis.call('UNLINK', KEYS[i]) end
redis.call('XDEL', batches, id)
local batch = map(found[2])
if batch.bytes and tonumber(batch.bytes) > 0 then
  redis.call('HINCRBY', state, 'kept_bytes', '-' .. batch.bytes)
end
for gid in each_gid(batch.gids) do redis.call('HDEL', trained, gid) end
for _, name in ipairs(batch.gids and passing or {}) do
  redis.call('HSET', skipped, name .. ':' .. step, batch.gids)
end
return 'freed'
