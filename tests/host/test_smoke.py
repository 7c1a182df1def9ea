def test_smoke(host, clients):
    a = host.agent
    for c in (["journalctl", "-b", "--no-pager", "-o", "cat", "-t", "systemd-fsck", "-t", "fsck"],):
        r = a.exec(c)
        print(r.rc, r.out, r.err)
    api = host.api(clients["admin"])
    with open("build/test/guests/linux.raw","rb") as f: data=f.read()
    try:
        print(api.call("PUT", "/v1/volumes/v1/content?format=raw", data))
    except Exception as e: print(repr(e))
    for args in (("POST","/v1/machines",{"name":"m1","cpus":1,"memory":256<<20,"disks":[{"volume":"v1"}],"networks":[{"network":"lan"}]}),("POST","/v1/machines/m1/start"),("GET","/v1/machines")):
      try: print(api.call(*args))
      except Exception as e: print(repr(e))
    r = a.exec(["journalctl", "-b", "--no-pager", "-n", "40"])
    print(r.out)
    try:
        c = api.console("m1"); c.expect("HOLDFAST-GUEST READY"); print("GUEST UP")
    except Exception as e: print(repr(e))
    r = a.exec(["sh", "-c", "journalctl -b --no-pager -n 30; cat /var/log/libvirt/qemu/*.log | tail -40"])
    print(r.out)
    assert False
