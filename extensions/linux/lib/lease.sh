# The lease: which job holds this guest, and until when. One file in memory, made by a hard link, so that it is there
# as a whole or not at all and only one of two jobs gets it. It names the job's folder in memory and the process that
# works on it; deadlines are uptimes, so no change of the clock prolongs it, and a reboot ends it.
#
# In the job's folder: `armed.1`, `armed.2` (deadline and process of the watchdogs), `watchdog.state` (armed or
# fired), `claim.N` (who resumes), `apps`, `app/NAME/…` and `out/…` of the scripts.

# Sets $held_job, $held_dir and the process that took the lease; fails if there is none.
read_lease() {
    held_job=
    { read -r held_job held_dir taker taker_start <"$mem/lease"; } 2>/dev/null
    [ -n "$held_job" ]
}

# Whether the lease that was read still counts: its watchdog's deadline has not passed, or the watchdog is at work, or
# somebody else is. Sets $left_s.
lease_holds() {
    now
    deadline=$now
    dog=
    { read -r deadline dog dog_start <"$held_dir/armed.1"; } 2>/dev/null
    { read -r deadline dog dog_start <"$held_dir/armed.2"; } 2>/dev/null
    left=$((${deadline:-$now} - now))
    [ "$left" -gt 0 ] || left=0
    fraction=$((left % 100))
    case $fraction in ?) fraction=0$fraction ;; esac
    left_s=$((left / 100)).$fraction
    [ "$left" -gt 0 ] || alive "$dog" "$dog_start" || alive "$taker" "$taker_start" || is_claimed
}

# Whether a living process resumes the job whose lease was read. Sets $claims to the number of those that began to.
is_claimed() {
    claims=0
    while [ -f "$held_dir/claim.$((claims + 1))" ]; do
        claims=$((claims + 1))
    done
    [ "$claims" -gt 0 ] || return
    { read -r claimer claimer_start <"$held_dir/claim.$claims"; } 2>/dev/null
    alive "$claimer" "$claimer_start"
}

# Takes the lease for $job and sets $dir to its folder, with room for the scripts that were found; ends with 11 while
# another job has it.
take_lease() {
    now
    dir=$mem/job.$$-$now
    [ "$count" -eq 0 ] || name_homes
    started_at $$
    { mkdir -p "$dir" $homes && echo "$job $dir $$ $start" >"$dir/lease" && echo armed >"$dir/watchdog.state"; } 2>/dev/null ||
        give_up "$mem cannot be written: is it full?"
    tries=0
    until ln "$dir/lease" "$mem/lease" 2>/dev/null; do
        tries=$((tries + 1))
        [ "$tries" -lt 5 ] || give_up "$mem/lease cannot be made"
        read_lease || continue
        if [ "$held_job" != "$job" ]; then
            if lease_holds; then
                rm -rf "$dir"
                fail 11 "job $held_job holds this guest for another $left_s s"
            fi
            note "job $held_job was never ended here, and was now"
        fi
        /bin/sh "$here/ext" resume --job "$held_job" >/dev/null 2>&1 </dev/null
    done
    remove_old
    # The same job may come again: what it came to before is not its result.
    last=
    { read -r last <"$mem/last"; } 2>/dev/null
    [ "$last" != "$job" ] || : >"$mem/last"
}

give_up() {
    rm -rf "$dir"
    fail 20 "$1"
}

# Removes folders of jobs whose end was cut short. Those that end right now remove themselves.
remove_old() {
    set +f
    for old in "$mem"/job.* "$mem"/probe.*; do
        set -f
        [ "$old" != "$dir" ] && [ -d "$old" ] || continue
        pid=${old##*.} # of the `quiesce` that made it, and may be about to ask for the lease
        [ ! -d "/proc/${pid%-*}" ] || continue
        ended=
        { read -r ended <"$old/ended"; } 2>/dev/null
        now
        [ -z "$ended" ] || [ $((now - ended)) -gt 60000 ] || continue
        rm -rf "$old"
    done
    set -f
}

# --- the watchdog ----------------------------------------------------------------------------------------------

# Sets $method to how a watchdog can thaw here, or to nothing. Opening the file does nothing yet.
find_method() {
    method=
    if { true >>/proc/sysrq-trigger; } 2>/dev/null; then
        method=sysrq
    elif command -v fsfreeze >/dev/null; then
        method=fsfreeze
    fi
}

# Arms watchdog number $1 with a deadline in $2 seconds, and then ends the one before. Without a way to thaw it is
# armed all the same: it resumes the job. Fails if it cannot be armed.
arm() {
    # One copy serves until the next boot.
    script=$mem/watchdog-$version
    if [ ! "$script" -nt "$here/watchdog" ]; then
        cat "$here/lib/common.sh" "$here/watchdog" >"$dir/watchdog" && mv -f "$dir/watchdog" "$script" || return
    fi
    # It says that it is armed and closes the descriptor: then the substitution ends, not with the process.
    said=$(
        setsid /bin/sh "$script" "$dir" "$job" "$1" "$2" "$method" "$here/ext" \
            3>&1 >/dev/null 2>&1 </dev/null 8>&- &
    )
    case $said in 'armed '*) ;; *) return 1 ;; esac
    end_watchdog
    echo "${said#armed }" >"$mem/watchdog" && return
    set -- ${said#armed }
    kill -KILL "-$1"
    return 1
} 2>/dev/null

# The same for the watchdog that is armed already: its deadline is in $1 seconds now. Fails if it did not say so within
# two ticks of a phase that was run before; then another one is to be armed.
arm_again() {
    { read -r dog dog_start <"$mem/watchdog"; } 2>/dev/null
    alive "$dog" "$dog_start" && echo "$1" >"$dir/again" && kill -USR1 "$dog" || return
    ticks=0
    while [ "$ticks" -lt 3 ] && read -r event of <&8; do
        case $event in
            armed) return ;;
            tick) ticks=$((ticks + 1)) ;;
        esac
    done
    return 1
} 2>/dev/null

# Ends the watchdog that was armed last, with its `sleep`.
end_watchdog() {
    dog=
    { read -r dog dog_start <"$mem/watchdog"; } 2>/dev/null || return 0
    alive "$dog" "$dog_start" && kill -KILL "-$dog"
    : >"$mem/watchdog"
}

# Sets $watched to what the watchdog of the job in $dir did: silent, fired, or absent.
ask_watchdog() {
    watched=absent
    state=
    { read -r state <"$dir/watchdog.state"; } 2>/dev/null
    if [ "$state" = fired ]; then
        watched=fired
        return
    fi
    for number in 2 1; do
        dog=
        { read -r deadline dog dog_start <"$dir/armed.$number"; } 2>/dev/null || continue
        alive "$dog" "$dog_start" && watched=silent
        return
    done
}
