# Answers and small tools. Sourced by ext.

# Prints the answer: the fields in $1, on one line.
answer() {
    line="{\"verb\": \"$verb\", \"ok\": true${1:+, $1}}"
    case $line in *"
"*) line=$(printf '%s' "$line" | tr '\n' ' ') ;; esac
    printf '%s\n' "$line"
}

# Prints an answer that says why not, and ends with code $1.
fail() {
    json "$2"
    printf '{"verb": "%s", "ok": false, "error": %s}\n' "${verb##*[!a-z]*}" "$quoted"
    exit "$1"
}

# Sets $quoted to the JSON string of $1. No program is run for the usual text.
json() {
    case $1 in
        *[!A-Za-z0-9\ ._:/@+=,\;\(\)\'-]*)
            quoted=\"$(printf '%s' "$1" | tr '\n\t' '  ' | tr -d '\001-\037\177' | sed 's/\\/\\\\/g; s/"/\\"/g')\"
            ;;
        *) quoted=\"$1\" ;;
    esac
}

# Prints the lines of a file as JSON strings.
json_lines() {
    first=1
    while IFS= read -r line; do
        json "$line"
        [ -n "$first" ] || printf ', '
        printf '%s' "$quoted"
        first=
    done <"$1"
}

note() {
    json "$1"
    notes="$notes${notes:+, }$quoted"
}

# Makes $2 a link to $1, by rename where the tools can.
link() {
    rm -f "$2.new"
    ln -s "$1" "$2.new" || fail 20 "cannot make the link $2"
    mv -T "$2.new" "$2" 2>/dev/null || { rm -f "$2" && mv "$2.new" "$2"; } || fail 20 "cannot replace the link $2"
}

# Sets $now to the guest's uptime in seconds, $ticks to hundredths: no wall clock is believed.
clock() {
    read -r ticks _ </proc/uptime
    now=${ticks%.*}
    ticks=$now${ticks#*.}
}

# A clone or a restored machine is not the one that wrote what lies here.
for_this_machine() {
    known=$(cat "$ROOT/machine" 2>/dev/null)
    if [ -n "$uuid" ] && [ "$known" != "$uuid" ]; then
        rm -rf "$RUN" "$LOGS"
        printf '%s\n' "$uuid" >"$ROOT/machine" || fail 20 "cannot write in $ROOT"
        [ -z "$known" ] || note "the machine was $known before: its state is reset"
    fi
    [ -n "$uuid" ] || uuid=$known
}

# The guest agent's control group is killed with it; what is begun here must outlive that.
leave_control_group() {
    for group in /sys/fs/cgroup/cgroup.procs /sys/fs/cgroup/systemd/cgroup.procs /sys/fs/cgroup/unified/cgroup.procs; do
        [ -e "$group" ] && { echo $$ >"$group"; } 2>/dev/null
    done
    return 0
}
