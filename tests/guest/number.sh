#!/bin/sh
# number DEVICE [COUNT]: write the numbers from 1 on, one to each block of 4096 bytes, and say each once it is on the disk.
# It goes on behind the last one that is there already, until COUNT more are written, without COUNT until the disk ends.
set -e
last=$(tr -d '\0' <"$1" | wc -l)
end=$((last + ${2:-1000000}))
while [ "$last" -lt "$end" ]; do
    echo $((last + 1)) | dd of="$1" bs=4096 count=1 seek="$last" conv=sync,notrunc,fsync 2>/dev/null
    last=$((last + 1))
    echo "HOLDFAST-GUEST WROTE $last"
    # So that the host's own work goes on meanwhile.
    sleep 0.1
done
