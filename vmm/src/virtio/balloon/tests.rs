//! The device behind a fake driver.

use super::super::testing::{Desc, DriverQueue, activation, event_loop, memory};
use super::super::{Activation, VirtioDevice};
use super::device::{BalloonDevice, BalloonWorker, F_REPORTING, INFLATE, REPORTING};
use super::request::MAX_PAGE_NUMBERS;
use crate::memory::PAGE_SIZE;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const DEFLATE: usize = INFLATE + 1;
const PAGE: u64 = PAGE_SIZE as u64;
/// Pages that no ring is in.
const FIRST: u64 = 0x20;
const PAGES: u64 = 16;

/// Inflate, deflate and reporting queue.
fn queues(mem: &GuestMemoryMmap) -> [DriverQueue; 3] {
    [0x1000, 0x8000, 0xc000].map(|base| DriverQueue::at(mem, 32, base))
}

fn activate(
    mem: &GuestMemoryMmap,
    queues: &[DriverQueue; 3],
    features: u64,
) -> (Activation, EventFd) {
    activation(mem, &queues.each_ref(), features)
}

fn fill(mem: &GuestMemoryMmap) {
    let bytes = vec![0xa5; (PAGES * PAGE) as usize];
    mem.write_slice(&bytes, GuestAddress(FIRST * PAGE)).unwrap();
}

/// Numbers of the filled pages that are zeros by now; none may be so in part.
fn given_back(mem: &GuestMemoryMmap) -> Vec<u64> {
    let mut page = [0; PAGE_SIZE];
    (FIRST..FIRST + PAGES)
        .filter(|number| {
            mem.read_slice(&mut page, GuestAddress(number * PAGE))
                .unwrap();
            let zeros = page.iter().filter(|&&byte| byte == 0).count();
            assert!(zeros == 0 || zeros == PAGE_SIZE, "page {number}: {zeros}");
            zeros == PAGE_SIZE
        })
        .collect()
}

#[test]
fn whole_reported_pages_go_back_to_the_host() {
    let mem = memory();
    fill(&mem);
    let mut queues = queues(&mem);
    let events = event_loop();
    let mut device = BalloonDevice::new(events.handle());
    let (activation, line) = activate(&mem, &queues, F_REPORTING);
    device.activate(activation).unwrap();
    let at = |page: u64| (FIRST + page) * PAGE;
    queues[REPORTING].add(&[
        // Read only: not free memory.
        Desc::readable(at(0), 4096),
        Desc::writable(at(1), 2 * 4096),
        // From within page 4 to within page 7.
        Desc::writable(at(4) + 1, 3 * 4096),
        // Less than a page, and a page's length that is no page.
        Desc::writable(at(9), 4095),
        Desc::writable(at(11) - 1, 4096),
    ]);
    queues[REPORTING].kick();
    assert_eq!(queues[REPORTING].wait_used(), (0, 0));
    assert_eq!(given_back(&mem), [1, 2, 5, 6].map(|page| FIRST + page));
    assert_eq!(line.read().unwrap(), 1);
    assert_eq!(device.reset().unwrap().len(), 3);
}

#[test]
fn inflated_pages_go_back_and_deflated_ones_stay() {
    let mem = memory();
    fill(&mem);
    let mut queues = queues(&mem);
    let events = event_loop();
    let mut device = BalloonDevice::new(events.handle());
    let (activation, _line) = activate(&mem, &queues, 0);
    device.activate(activation).unwrap();
    let wanted = [FIRST + 3, FIRST + 4, FIRST + 9];
    let list = |numbers: &[u64]| -> Vec<u8> {
        let numbers = numbers.iter().map(|&number| number as u32);
        numbers.flat_map(u32::to_le_bytes).collect()
    };
    mem.write_slice(&list(&wanted), GuestAddress(0x10000))
        .unwrap();
    // Two bytes of a number at the end.
    let chain = [Desc::readable(0x10000, 5), Desc::readable(0x10005, 9)];
    queues[DEFLATE].add(&chain);
    queues[DEFLATE].kick();
    assert_eq!(queues[DEFLATE].wait_used(), (0, 0));
    assert!(given_back(&mem).is_empty());
    queues[INFLATE].add(&chain);
    queues[INFLATE].kick();
    assert_eq!(queues[INFLATE].wait_used(), (0, 0));
    assert_eq!(given_back(&mem), wanted);

    fill(&mem);
    let mut many = vec![FIRST; MAX_PAGE_NUMBERS];
    many.push(FIRST + 1);
    mem.write_slice(&list(&many), GuestAddress(0x10000))
        .unwrap();
    queues[INFLATE].add(&[Desc::readable(0x10000, 4 * many.len() as u32)]);
    queues[INFLATE].kick();
    queues[INFLATE].wait_used();
    assert_eq!(given_back(&mem), [FIRST], "one number too many is left");
}

#[test]
fn a_page_outside_memory_breaks_the_device_and_nothing_else() {
    let mem = memory();
    let mut queues = queues(&mem);
    let (activation, _line) = activate(&mem, &queues, F_REPORTING);
    let interrupt = activation.interrupt.clone();
    let mut worker = BalloonWorker::new(activation);
    mem.write_obj(u32::MAX.to_le(), GuestAddress(0x10000))
        .unwrap();
    queues[INFLATE].add(&[Desc::readable(0x10000, 4)]);
    let result = worker.serve();
    let error = result.as_ref().unwrap_err().to_string();
    assert!(error.contains("0xffffffff000"), "{error}");
    worker.context.check(result);
    assert!(worker.context.broken() && interrupt.reset_needed());
}

#[test]
fn without_the_feature_nothing_is_reported() {
    let mem = memory();
    fill(&mem);
    let mut queues = queues(&mem);
    let (activation, _line) = activate(&mem, &queues, 0);
    queues[REPORTING].add(&[Desc::writable(FIRST * PAGE, 4096)]);
    BalloonWorker::new(activation).serve().unwrap();
    assert_eq!(queues[REPORTING].used(), None);
    assert!(given_back(&mem).is_empty());
}

proptest! {
    /// Any chains in any queue: bounded work, and broken ones break the queue instead of the VMM.
    #[test]
    fn any_chains_are_survived(
        chains in prop::collection::vec((0..3usize, prop::collection::vec(Desc::any(), 1..6)), 1..8),
        numbers: [u32; 16],
    ) {
        let mem = memory();
        let mut queues = queues(&mem);
        // Where most descriptors lead: a mix of pages in memory and others.
        for (index, number) in numbers.iter().enumerate() {
            let number = if index % 2 == 0 { number % 0x400 } else { *number };
            mem.write_obj(number, GuestAddress(0x4000 + 4 * index as u64)).unwrap();
        }
        for (queue, chain) in &chains {
            queues[*queue].add(chain);
        }
        let (activation, _line) = activate(&mem, &queues, F_REPORTING);
        let mut worker = BalloonWorker::new(activation);
        let result = worker.serve();
        let failed = result.is_err();
        worker.context.check(result);
        prop_assert_eq!(worker.context.broken(), failed);
    }

    /// Whatever ranges are reported, pages that no range holds as a whole keep their bytes.
    #[test]
    fn only_whole_pages_within_a_range_go_back(
        ranges in prop::collection::vec((0..PAGES * PAGE, 0..4 * PAGE), 1..6),
    ) {
        let mem = memory();
        fill(&mem);
        let mut queues = queues(&mem);
        let start = FIRST * PAGE;
        let chain: Vec<Desc> = ranges
            .iter()
            .map(|&(offset, len)| Desc::writable(start + offset, len as u32))
            .collect();
        queues[REPORTING].add(&chain);
        let (activation, _line) = activate(&mem, &queues, F_REPORTING);
        BalloonWorker::new(activation).serve().unwrap();
        let expected: Vec<u64> = (0..PAGES)
            .filter(|page| ranges.iter().any(|(offset, len)| {
                *offset <= page * PAGE && (page + 1) * PAGE <= offset + len
            }))
            .map(|page| FIRST + page)
            .collect();
        prop_assert_eq!(given_back(&mem), expected);
    }
}
