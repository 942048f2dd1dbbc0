--- @include entries
-- The letters of the stream `refused`, and the bodies of those that are of refused posts: `kept`
-- bytes each, in blob:<gid>. `refused_bytes` in the hash `settings` is the sum of `kept` over the
-- stream, at any time.
local function of_run(refused, key) return (string.gsub(refused, 'refused$', '')) .. key end

local function count_kept(refused, bytes)
  local settings = of_run(refused, 'settings')
  return redis.call('HINCRBY', settings, 'refused_bytes', string.format('%.0f', bytes))
end

local function forget_letter(refused, letter)
  local entry = map(letter[2])
  redis.call('XDEL', refused, letter[1])
  if string.find(entry.gid or '', '^refused%-') then
    redis.call('UNLINK', of_run(refused, 'blob:' .. entry.gid))
  end
  local kept = tonumber(entry.kept or '') or 0
  if kept > 0 then count_kept(refused, -kept) end
end

-- Forget the oldest: those beyond `most` letters, those older than `since` (milliseconds), and
-- those over `bytes` (nil: any number).
local function trim_letters(refused, most, since, bytes)
  while true do
    local oldest = redis.call('XRANGE', refused, '-', '+', 'COUNT', 1)[1]
    if not oldest then return end
    local few = redis.call('XLEN', refused) <= most
    local young = tonumber(string.match(oldest[1], '^%d+')) >= since
    local kept = redis.call('HGET', of_run(refused, 'settings'), 'refused_bytes') or '0'
    local small = not bytes or tonumber(kept) <= bytes
    if few and young and small then return end
    forget_letter(refused, oldest)
  end
end
