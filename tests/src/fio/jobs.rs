//! What fio does in each case of `bench io`: its jobs, and the marks between them by which a host
//! outside of the machine knows when which of them runs.

use bulkhead_bench_guest::{BLOCK, MARKS_AT, MAX_MARKS};

/// What is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A disk, without a file system.
    Block,
    /// A file of the root, EROFS on a disk.
    Erofs,
    /// A file of a shared folder, virtio-fs.
    Fs,
}

/// A job of fio's.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// In the JSON.
    pub name: &'static str,
    /// Where.
    pub place: Place,
    /// fio's `rw`.
    pub pattern: &'static str,
    /// Bytes of a request.
    pub request: u64,
    /// Bytes of all.
    pub total: u64,
    /// Requests under way at a time; more than one by io_uring.
    pub depth: u32,
    /// Past the page cache of the machine that fio runs in.
    pub direct: bool,
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Length of what is read and written: longer than any transfer.
pub const FILE_BYTES: u64 = 16 * MIB;

const fn case(name: &'static str, place: Place, pattern: &'static str) -> Case {
    Case {
        name,
        place,
        pattern,
        request: 4 * KIB,
        total: 256 * KIB,
        depth: 1,
        direct: true,
    }
}

const fn sequential(name: &'static str, place: Place, pattern: &'static str) -> Case {
    Case {
        request: MIB,
        total: 8 * MIB,
        ..case(name, place, pattern)
    }
}

/// All. Small, as a KVM that emulates guest kernel mode takes 27 ms for a request of 4 KiB.
pub const ALL: [Case; 13] = [
    sequential("block_sequential_read", Place::Block, "read"),
    sequential("block_sequential_write", Place::Block, "write"),
    case("block_random_read", Place::Block, "randread"),
    case("block_random_write", Place::Block, "randwrite"),
    Case {
        depth: 16,
        total: MIB,
        ..case("block_deep_read", Place::Block, "randread")
    },
    Case {
        depth: 16,
        total: MIB,
        ..case("block_deep_write", Place::Block, "randwrite")
    },
    Case {
        direct: false,
        total: MIB,
        ..sequential("block_cached_read", Place::Block, "read")
    },
    Case {
        direct: false,
        total: 2 * MIB,
        ..sequential("erofs_sequential_read", Place::Erofs, "read")
    },
    Case {
        direct: false,
        ..case("erofs_random_read", Place::Erofs, "randread")
    },
    sequential("fs_sequential_read", Place::Fs, "read"),
    sequential("fs_sequential_write", Place::Fs, "write"),
    case("fs_random_read", Place::Fs, "randread"),
    case("fs_random_write", Place::Fs, "randwrite"),
];

/// What all jobs of a file have in common.
const COMMON: &str = "[global]
thread
stonewall
";

/// Where the control disk is written to without meaning anything: behind the last mark.
const WARM_UP_AT: u64 = MARKS_AT + (MAX_MARKS * BLOCK) as u64;

/// fio's options besides the file.
pub const OPTIONS: [&str; 3] = ["--output-format=json", "--eta=never", "--disk_util=0"];

/// Name of the job that costs what the cases with such requests cost besides their transfers.
pub fn idle_name(case: &Case) -> String {
    format!("idle_{}_{}", case.request, case.depth)
}

/// A file of jobs, one after the other, and what is between its marks.
pub struct Jobs {
    /// The file.
    pub text: String,
    /// Names of the jobs; a mark comes before each of them and after the last one.
    pub names: Vec<String>,
}

impl Jobs {
    /// Of these cases, on the files that `file_of` names, with marks on `control`.
    pub fn marked<'a>(
        cases: impl Iterator<Item = &'a Case> + Clone,
        file_of: impl Fn(&Case) -> String,
        control: &str,
    ) -> Self {
        let mut jobs = Self {
            text: COMMON.to_owned(),
            names: Vec::new(),
        };
        // So that nothing of fio has to be read any more.
        jobs.text += "[warm_null]\nioengine=null\nsize=4k\nbs=4k\nrw=read\n";
        for engine in ["psync", "io_uring"] {
            jobs.text += &format!(
                "[warm_{engine}]\nfilename={control}\nioengine={engine}\noffset={WARM_UP_AT}\nsize={BLOCK}\n\
                 bs={BLOCK}\ndirect=1\nrw=write\n"
            );
        }
        for case in cases.clone() {
            let name = idle_name(case);
            if !jobs.names.contains(&name) {
                jobs.add(name, &case.idle_job(), control);
            }
        }
        for case in cases {
            jobs.add(case.name.to_owned(), &case.job(&file_of(case)), control);
        }
        jobs.mark(control);
        jobs
    }

    fn add(&mut self, name: String, job: &str, control: &str) {
        self.mark(control);
        self.text += &format!("[{name}]\n{job}");
        self.names.push(name);
    }

    fn mark(&mut self, control: &str) {
        let number = self.names.len();
        let at = MARKS_AT + (number * BLOCK) as u64;
        self.text += &format!(
            "[mark_{number}]\nfilename={control}\noffset={at}\nsize={BLOCK}\nbs={BLOCK}\nrw=write\n\
             ioengine=psync\ndirect=1\nbuffer_pattern=0x4248\n"
        );
    }
}

impl Case {
    /// Its job, for one file.
    fn job(&self, file: &str) -> String {
        format!(
            "filename={file}\nioengine={}\n{}",
            if self.depth > 1 { "io_uring" } else { "psync" },
            self.common(),
        )
    }

    /// The same without transfers.
    fn idle_job(&self) -> String {
        format!("ioengine=null\n{}", self.common())
    }

    fn common(&self) -> String {
        let mut lines = format!(
            "rw={}\nbs={}\nsize={FILE_BYTES}\nio_size={}\niodepth={}\ndirect={}\n",
            self.pattern,
            self.request,
            self.total,
            self.depth,
            u8::from(self.direct),
        );
        if !self.direct && self.pattern.ends_with("write") {
            // It has arrived at the end.
            lines += "end_fsync=1\n";
        }
        lines
    }

    /// Its only job, which goes on for some seconds.
    pub fn timed_job(&self, file: &str, seconds: u32) -> String {
        let job = self.job(file);
        format!(
            "{COMMON}[{}]\n{job}time_based\nruntime={seconds}\n",
            self.name
        )
    }

    /// In words.
    pub fn meaning(&self) -> String {
        let place = match self.place {
            Place::Block => "a disk",
            Place::Erofs => "a file of the EROFS root",
            Place::Fs => "a file on virtio-fs",
        };
        let cache = if self.direct {
            "direct"
        } else {
            "through the page cache"
        };
        format!(
            "{} of {place}, {} KiB in requests of {} KiB, {} at a time, {cache}",
            self.pattern,
            self.total / KIB,
            self.request / KIB,
            self.depth,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_before_each_job_and_after_the_last() {
        let cases = &ALL[..4];
        let jobs = Jobs::marked(cases.iter(), |_| "/dev/x".into(), "/dev/control");
        assert_eq!(
            jobs.names,
            [
                "idle_1048576_1",
                "idle_4096_1",
                "block_sequential_read",
                "block_sequential_write",
                "block_random_read",
                "block_random_write",
            ]
        );
        let sections: Vec<&str> = jobs
            .text
            .lines()
            .filter(|line| line.starts_with('['))
            .collect();
        assert_eq!(sections.len(), 1 + 3 + 6 + 7);
        assert_eq!(sections[4..6], ["[mark_0]", "[idle_1048576_1]"]);
        assert_eq!(sections.last(), Some(&"[mark_6]"));
        assert!(
            jobs.text
                .contains(&format!("offset={}\n", MARKS_AT + 6 * 4096))
        );
    }

    #[test]
    fn names_are_distinct_and_transfers_fit() {
        let names: std::collections::HashSet<_> = ALL.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(
            ALL.iter()
                .all(|case| case.total <= FILE_BYTES && case.total % case.request == 0)
        );
    }
}
