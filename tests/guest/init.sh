#!/bin/busybox sh
# Process 1 of the Linux test guest: commands on the first serial port, power off on the ACPI button.
/bin/busybox mkdir -p /proc /sys /dev /tmp /etc/acpi/PWRF
/bin/busybox --install -s /bin
export PATH=/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module"
done </modules/order

printf '#!/bin/sh\npoweroff -f\n' >/etc/acpi/PWRF/00000080
chmod 755 /etc/acpi/PWRF/00000080
acpid -l /dev/null
# READY promises that the button works, and acpid opens its devices after going to the background.
until [ "$(ls -l /proc/[0-9]*/fd 2>/dev/null | grep -c /dev/input/event)" -ge "$(ls /dev/input | grep -c event)" ]; do
    sleep 0.05
done

echo "HOLDFAST-GUEST READY" >/dev/ttyS0
while :; do
    setsid cttyhack shell
done
