"""The Lua script that atomically changes the limits of one tenant in Valkey or Redis. valkey_limits.py runs the
script."""

import hashlib

SCRIPT = r"""
-- Changes one tenant's limits atomically. KEYS: the tenant's hash, the set of gateways (score: last heartbeat).
-- ARGV: operation, now (-1: the store's own clock), gateway, day, month, the least use of the day and of the month that
-- the gateway knows (number and use of the day, number and use of the month), then the arguments of the operation.
-- Fields of the hash: r<second>, t<second>: requests and weighted tokens; c:<gateway>: running calls; dn, du, mn, mu:
-- number and use of the day and of the month; last, off: as in windows.Steady. All are numbers.
local WINDOW, ALIVE = 60, 10
local function arg(i) return tonumber(ARGV[9 + i]) end
local key, op, me = KEYS[1], ARGV[1], ARGV[3]
local day, month = tonumber(ARGV[4]), tonumber(ARGV[5])
local now = tonumber(ARGV[2])
if now < 0 then
  local t = redis.call('TIME')
  now = tonumber(t[1]) + tonumber(t[2]) / 1000000
end

local h, flat = {}, redis.call('HGETALL', key)
for i = 1, #flat, 2 do h[flat[i]] = tonumber(flat[i + 1]) end
local function set(field, value)
  h[field] = value
  redis.call('HSET', key, field, string.format('%.6f', value))
end
local function add(field, value) set(field, (h[field] or 0) + value) end

local steady = now + (h.off or 0)
if h.last and steady < h.last then
  if h.last - steady > WINDOW then set('off', (h.off or 0) + h.last - steady) end
  steady = h.last
end
set('last', steady)
local second = math.floor(steady)
if day > (h.dn or -1) then set('dn', day) set('du', 0) end
if month > (h.mn or -1) then set('mn', month) set('mu', 0) end

-- A store that has lost its data, or that is new, must not give a tenant its whole budgets again.
local function raise(day_of, day_used, month_of, month_used)
  if h.dn == day_of and h.du < day_used then set('du', day_used) end
  if h.mn == month_of and h.mu < month_used then set('mu', month_used) end
end
raise(tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]))

local sums, seconds, running = {r = 0, t = 0}, {r = {}, t = {}}, 0
for field, value in pairs(h) do
  local kind, number = string.match(field, '^([rt])(%d+)$')
  if kind then
    if tonumber(number) < second - WINDOW then
      redis.call('HDEL', key, field)
    else
      sums[kind] = sums[kind] + value
      table.insert(seconds[kind], tonumber(number))
    end
  elseif string.sub(field, 1, 2) == 'c:' then
    local beat = redis.call('ZSCORE', KEYS[2], string.sub(field, 3))
    if beat and tonumber(beat) >= now - ALIVE then
      running = running + math.max(value, 0)
    else
      redis.call('HDEL', key, field)
      h[field] = nil
    end
  end
end
redis.call('EXPIRE', key, 40 * 86400)

local function frees(kind, amount)
  if amount <= 0 then return 0 end
  table.sort(seconds[kind])
  local freed = 0
  for _, at in ipairs(seconds[kind]) do
    freed = freed + h[kind .. at]
    if freed >= amount then return math.max(at + 1 + WINDOW - steady, 0) end
  end
  return WINDOW
end
local function text(...)
  local out = {}
  for i, value in ipairs({...}) do out[i] = string.format('%.3f', value) end
  return out
end
local function spend(plain, day_of, month_of)
  if h.dn == day_of then add('du', plain) end
  if h.mn == month_of then add('mu', plain) end
end

if op == 'reserve' or op == 'charge' then
  -- weighted, plain, then limits (-1: none): month, day, concurrent, requests, tokens; how many requests it counts as
  local weighted, plain, requests = arg(1), arg(2), arg(8)
  local runs = op == 'reserve' and 1 or 0
  local used = {h.mu, h.du, running, sums.r, sums.t}
  local wanted = {plain, plain, runs, requests, weighted}
  for i = 1, 5 do
    local limit = arg(2 + i)
    if limit >= 0 and wanted[i] > 0 and used[i] + wanted[i] > limit then
      local kind = i == 4 and 'r' or 't'
      local retry = i > 3 and frees(kind, used[i] + wanted[i] - limit) or 0
      local reset = i > 3 and frees(kind, sums[kind]) or 0
      return text(0, i, used[i], retry, reset, sums.r, frees('r', sums.r), sums.t, frees('t', sums.t))
    end
  end
  for kind, amount in pairs({r = requests, t = weighted}) do
    if not h[kind .. second] then table.insert(seconds[kind], second) end
    add(kind .. second, amount)
    sums[kind] = sums[kind] + amount
  end
  if runs > 0 then add('c:' .. me, 1) end
  spend(plain, h.dn, h.mn)
  return text(1, second, h.dn, h.mn, sums.r, frees('r', sums.r), sums.t, frees('t', sums.t))
elseif op == 'take' then -- needed, quantum, weight of output, stop, daily, monthly limit, day and month of the call
  local needed, quantum, weight = arg(1), arg(2), arg(3)
  local left, wanted, go = math.huge, needed + quantum, 1
  if arg(5) >= 0 then left = math.min(left, arg(5) - h.du) end
  if arg(6) >= 0 then left = math.min(left, arg(6) - h.mu) end
  if arg(4) == 1 and left < wanted then
    wanted = math.max(left, needed)
    if left <= 0 then go = 0 end
  end
  local weighted = math.ceil(weight * wanted)
  add('t' .. second, weighted)
  spend(wanted, arg(7), arg(8))
  return text(go, wanted, second, weighted)
elseif op == 'settle' then -- plain, day, month of the call, then pairs: second (-1: now), weighted
  spend(arg(1), arg(2), arg(3))
  for i = 4, #ARGV - 9, 2 do
    local at = arg(i)
    if at < 0 then at = second end
    if at == second or h['t' .. at] then add('t' .. at, arg(i + 1)) end
  end
  set('c:' .. me, math.max((h['c:' .. me] or 0) - 1, 0))
  return text(1)
elseif op == 'mend' then
  -- what this gateway counted without the store: plain, running here; then its own sums: number and use of the day and
  -- of the month
  spend(arg(1), h.dn, h.mn)
  raise(arg(3), arg(4), arg(5), arg(6))
  set('c:' .. me, arg(2))
  return text(1)
end
return redis.error_reply('unknown operation ' .. op)
"""

SCRIPT_SHA = hashlib.sha1(SCRIPT.encode(), usedforsecurity=False).hexdigest()
"""Digest by which EVALSHA names the script."""
