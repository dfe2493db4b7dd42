//! A named VM with a stock Debian kernel: it lives on, gets another size, and goes back from one that it cannot boot with.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::guest::{LIMIT, assets, turn, value};
use crate::support::{Ended, Running, tranche};

struct Home(TempDir);

impl Home {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = tranche();
        let dir = |name: &str| self.0.path().join(name);
        command.args(words).current_dir(self.0.path());
        command
            .env("XDG_STATE_HOME", dir("state"))
            .env("XDG_RUNTIME_DIR", dir("run"))
            .env("XDG_CACHE_HOME", dir("cache"));
        command
    }

    fn run(&self, words: &[&str]) -> Ended {
        Running::start(&mut self.command(words)).wait(LIMIT)
    }

    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        self.run(words).expect_code(0).output
    }

    /// Has the guest's shell run a script, and returns what came of it.
    fn shell(&self, script: &str) -> String {
        let mut attached = Running::start(&mut self.command(&["attach", "web"]));
        // Not as it is typed, which the terminal gives back.
        attached.send(&format!("\n{script}; echo script=$((40 + 2))\n"));
        attached.output.wait_for("script=42", LIMIT);
        attached.output.text()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.command(&["kill", "web"]).output();
    }
}

fn sound(disk: &Path) -> String {
    let path = "/usr/sbin:/sbin:/usr/bin:/bin";
    let output = Command::new("e2fsck").env("PATH", path).args(["-f", "-n"]).arg(disk).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    text
}

#[test]
fn it_gets_another_size_and_keeps_what_it_has() {
    let _turn = turn();
    let home = Home(TempDir::new().unwrap());
    let disk = home.0.path().join("root.img");
    std::fs::copy(assets().join("rootfs.ext4"), &disk).unwrap();
    let (kernel, initrd) = (assets().join("cloud/vmlinuz"), assets().join("cloud/initrd"));
    let [kernel, initrd] = [&kernel, &initrd].map(|path| path.to_str().unwrap());
    let words = ["create", "web", "--kernel", kernel, "--initrd", initrd, "--rootfs", "root.img", "--ready", "# "];
    home.done(&[&words[..], &["--cmdline", "quiet", "--memory", "256M"]].concat());
    home.done(&["start", "web"]);
    home.done(&["wait", "web", "--for", "boot", "--timeout", "300"]);
    let before =
        home.shell("echo kept > /kept; sync; echo cpus=$(nproc); echo kib=$(df -k / | tail -n 1 | awk '{print $2}')");
    assert_eq!(value(&before, "cpus"), "1");
    assert!(value(&before, "kib").parse::<u64>().unwrap() < 64 << 10, "{before}");

    // Of a VM that runs, the next start is of another size; and this is it.
    home.done(&["resize", "web", "--cpus", "3", "--memory", "512M", "--disk", "root=256M"]);
    assert!(home.done(&["ls"]).contains("running (changes pending)  1"));
    home.done(&["stop", "web", "--timeout", "300"]);
    home.done(&["start", "web"]);
    home.done(&["wait", "web", "--for", "boot", "--timeout", "300"]);
    let after = home.shell(
        "echo cpus=$(nproc); echo kib=$(df -k / | tail -n 1 | awk '{print $2}'); \
         echo total=$(free | awk '/^Mem/ {print $2}'); echo file=$(cat /kept)",
    );
    assert_eq!((value(&after, "cpus"), value(&after, "file")), ("3", "kept"));
    let (kib, total) = (value(&after, "kib").parse::<u64>().unwrap(), value(&after, "total").parse::<u64>().unwrap());
    assert!((230 << 10..256 << 10).contains(&kib), "{after}");
    assert!((400 << 10..512 << 10).contains(&total), "{after}");

    // With so little memory this kernel does not boot.
    let ended = home.run(&["resize", "web", "--memory", "40M", "--restart", "--timeout", "300"]).expect_code(98);
    assert!(ended.errors.contains("the definition is as it was"), "{}", ended.errors);
    assert!(ended.errors.contains("'web' is up, as it was before"), "{}", ended.errors);
    let back = home.shell("echo cpus=$(nproc); echo file=$(cat /kept)");
    assert_eq!((value(&back, "cpus"), value(&back, "file")), ("3", "kept"));
    home.done(&["stop", "web", "--timeout", "300"]);
    sound(&disk);
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 256 << 20);
}
