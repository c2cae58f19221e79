# What programs do with files, and what they see of it. Printed in sections, `== NAME`, for a
# comparison of two file systems; argument: an empty folder. Needs nothing but Debian's perl-base.
use strict;
use Fcntl qw(:DEFAULT :flock :mode :seek);
use POSIX ();
use Socket;

my $base = shift;
my $number = 0;
$| = 1;

# Runs a case in a folder of its own.
sub section {
    my ($name, $code) = @_;
    print "== $name\n";
    my $folder = sprintf("%s/%02d", $base, $number++);
    mkdir($folder) && chdir($folder) or die "$folder: $!";
    umask(022);
    eval { $code->(); 1 } or print "died: $@";
}

# A result: its value, or the error's number.
sub show {
    my ($what, $result) = @_;
    my $failed = !defined($result) || $result eq '' || $result eq '-1' || $result eq '0';
    print "$what: ", ($failed && $! ? 'E' . ($! + 0) : $result), "\n";
    $! = 0;
}

sub spill { my ($path, $text) = @_; open(my $f, '>', $path) or return; print $f $text; close($f); $! = 0; 1 }
sub slurp { my $path = shift; open(my $f, '<', $path) or return "E" . ($! + 0); local $/; scalar(<$f>) }
sub about {
    for my $path (@_) {
        my @s = lstat($path) or do { print "$path: E", $! + 0, "\n"; next };
        printf("%s: %06o links=%d owner=%d:%d size=%s\n", $path, $s[2], $s[3], $s[4], $s[5],
            S_ISDIR($s[2]) ? '-' : $s[7]);
    }
}
sub names { opendir(my $d, shift) or return "E" . ($! + 0); join(' ', sort(grep { !/^\.\.?$/ } readdir($d))) }

# Runs code as another user, in a process of its own.
sub as_user {
    my ($id, $code) = @_;
    my $pid = fork();
    if (!$pid) { $) = "$id $id"; $( = $id; POSIX::setuid($id); $code->(); POSIX::_exit(0) }
    waitpid($pid, 0);
    print "ended: $?\n";
}

section 'ownership and modes' => sub {
    umask(027);
    spill('f', ''); mkdir('d');
    show('chown', chown(12, 34, 'f', 'd'));
    show('chmod', chmod(02751, 'd')); show('chmod', chmod(04755, 'f'));
    spill('d/in', '');
    about('f', 'd', 'd/in');
    chown(1, 1, 'f'); chmod(01777, 'd'); about('f', 'd');
    mkdir('d/sub'); about('d/sub');
};

section 'hard and symbolic links' => sub {
    spill('f', 'text');
    show('link', link('f', 'g')); show('symlink', symlink('f', 's'));
    symlink('/no/such/file', 'broken'); symlink('../x/../f', 'up'); symlink('loop', 'loop');
    about('f', 'g', 's', 'broken');
    print join(' ', map { readlink } 's', 'broken', 'up'), "\n", slurp('s'), slurp('broken'), slurp('loop'), "\n";
    unlink('f'); print slurp('g'), slurp('s'), "\n";
    mkdir('d');
    show('link a folder', link('d', 'e')); show('link over', link('g', 's')); show('link into nothing', link('g', 'd/x/y'));
    show('a long link', symlink('x' x 4000, 'long')); print length(readlink('long')), "\n";
    about('g');
};

section 'names at their limits and deep paths' => sub {
    for my $name ('x' x 255, 'x' x 256, "with\nnewline", "\xff\xfe bytes", ' ', '...') {
        show('make', spill($name, '') ? 1 : undef);
    }
    print length(names('.')), "\n";
    my $name = 'a-folder-with-a-name-of-some-length';
    for (1 .. 40) { mkdir($name) or show('mkdir', undef); chdir($name) or show('chdir', undef) }
    show('write', spill('f', 'deep')); print slurp('f'), "\n";
    show('by its whole path', -e "$base/02/" . ($name . '/') x 40 . 'f');
    for (1 .. 40) { unlink('f'); chdir('..'); rmdir($name) or show('rmdir', undef) }
};

section 'rename, also over what is there' => sub {
    spill('a', 1); spill('b', 2); show('over a file', rename('a', 'b')); print slurp('b'), "\n";
    mkdir('d'); mkdir('e'); spill('e/x', '');
    show('over a full folder', rename('d', 'e')); unlink('e/x'); show('over an empty one', rename('d', 'e'));
    show('a file over a folder', rename('b', 'e')); show('a folder over a file', rename('e', 'b'));
    mkdir('p'); mkdir('p/q'); show('into itself', rename('p', 'p/q/r')); show('nothing', rename('none', 'x'));
    link('b', 'c'); show('one file, two names', rename('b', 'c')); print names('.'), "\n";
    # renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE.
    my ($b, $c, $p, $new) = ('b', 'c', 'p', 'new');
    show('without replacing', syscall(316, -100, $b, -100, $p, 1)); show('to a new name', syscall(316, -100, $b, -100, $new, 1));
    show('exchange', syscall(316, -100, $c, -100, $p, 2)); about('c', 'p'); print names('.'), "\n";
};

section 'unlink while open' => sub {
    open(my $f, '+>', 'f'); syswrite($f, 'held'); unlink('f');
    print names('.'), "|\n"; sysseek($f, 0, SEEK_SET); sysread($f, my $text, 10); syswrite($f, ' more');
    my @s = stat($f); print "$text links=$s[3] size=$s[7]\n";
    show('fchmod', chmod(0600, $f)); show('truncate', truncate($f, 2)); print +(stat($f))[7], "\n";
    spill('f', 'another'); sysseek($f, 0, SEEK_SET); sysread($f, $text, 10); print "$text ", slurp('f'), "\n";
    mkdir('d'); opendir(my $d, 'd'); rmdir('d'); print join(' ', grep { !/^\.\.?$/ } readdir($d)), "|\n";
};

section 'sizes: holes, a large file, what is written behind the end' => sub {
    open(my $f, '+>', 'big'); show('truncate', truncate($f, 5 << 30)); sysseek($f, 6 << 30, SEEK_SET); syswrite($f, 'x');
    print -s 'big', "\n"; sysseek($f, (6 << 30) - 1, SEEK_SET); sysread($f, my $text, 10); print unpack('H*', $text), "\n";
    # SEEK_DATA and SEEK_HOLE.
    show('data', sysseek($f, 0, 3)); show('hole', sysseek($f, (6 << 30), 4)); show('no data', sysseek($f, 7 << 30, 3));
    truncate($f, 7); sysseek($f, 9, SEEK_SET); syswrite($f, 'abc'); print unpack('H*', slurp('big')), "\n";
    show('fallocate', syscall(285, fileno($f), 0, 0, 100000)); print -s 'big', "\n";
    # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE.
    show('punch', syscall(285, fileno($f), 3, 8, 3)); print unpack('H*', substr(slurp('big'), 0, 13)), "\n";
    show('beyond all', truncate($f, 1 << 62) ? 1 : undef); show('negative', syscall(77, fileno($f), -1));
};

section 'appending by several writers' => sub {
    my @pids = map { my $n = $_; fork() || do {
        sysopen(my $f, 'f', O_WRONLY | O_APPEND | O_CREAT); syswrite($f, "line $n\n") for 1 .. 10; POSIX::_exit(0) } } 1 .. 4;
    waitpid($_, 0) for @pids;
    my @lines = split(/\n/, slurp('f')); my %seen; $seen{$_}++ for @lines;
    print scalar(@lines), ' ', join(' ', map { "$_=$seen{$_}" } sort(keys(%seen))), "\n";
};

section 'direct and synchronous transfers' => sub {
    # A buffer on a page of its own: mmap(2), which read(2) and write(2) then use by its address.
    my $page = syscall(9, 0, 8192, 3, 0x22, -1, 0);
    open(my $pattern, '>', 'pattern'); syswrite($pattern, join('', map { chr($_ % 251) } 0 .. 8191)); close($pattern);
    sysopen(my $f, 'pattern', O_RDONLY | 040000) or return show('open', undef);
    show('read', syscall(0, fileno($f), $page, 8192));
    sysopen(my $g, 'copy', O_RDWR | O_CREAT | 040000); show('write', syscall(1, fileno($g), $page, 8192));
    show('a sector', syscall(18, fileno($g), $page, 512, 8192)); print -s 'copy', "\n";
    print slurp('pattern') eq substr(slurp('copy'), 0, 8192) ? "same\n" : "other\n";
    sysopen(my $h, 'sync', O_WRONLY | O_CREAT | O_SYNC); show('O_SYNC', syswrite($h, 'x' x 5000));
    show('fsync', syscall(74, fileno($h))); show('fdatasync', syscall(75, fileno($h))); show('syncfs', syscall(306, fileno($h)));
    opendir(my $d, '.'); show('fsync of a folder', syscall(74, POSIX::open('.', O_RDONLY)));
};

section 'memory maps' => sub {
    spill('f', 'a' x 10000); sysopen(my $f, 'f', O_RDWR); spill('source', 'Z' x 100); open(my $s, '<', 'source');
    # Shared: what is written to it is the file's; private: not.
    my $shared = syscall(9, 0, 10000, 3, 1, fileno($f), 0); my $private = syscall(9, 0, 10000, 3, 2, fileno($f), 0);
    show('into the shared map', syscall(17, fileno($s), $shared + 5000, 10, 0));
    show('into the private map', syscall(17, fileno($s), $private + 100, 10, 0));
    sysseek($f, 4998, SEEK_SET); sysread($f, my $text, 14); print "$text\n";
    show('msync', syscall(26, $shared, 10000, 4)); print slurp('f') =~ tr/Z//, "\n";
    sysseek($f, 6000, SEEK_SET); syswrite($f, 'QQ'); print unpack('P2', pack('Q', $shared + 6000)), "\n";
    unlink('f'); print unpack('P3', pack('Q', $shared + 4999)), "\n"; show('munmap', syscall(11, $shared, 10000));
};

section 'locks' => sub {
    open(my $f, '>', 'f'); show('flock', flock($f, LOCK_EX));
    my $try = sub { my $mode = shift; my $pid = fork() || do { open(my $g, '+<', 'f'); POSIX::_exit(flock($g, $mode | LOCK_NB) ? 0 : 1) };
        waitpid($pid, 0); print 'another: ', $? >> 8, "\n" };
    $try->(LOCK_SH); flock($f, LOCK_SH); $try->(LOCK_SH); $try->(LOCK_EX); flock($f, LOCK_UN); $try->(LOCK_EX);
    # fcntl(2): F_SETLK on bytes 10 to 19.
    my $range = sub { my ($type, $start) = @_; pack('s s x4 q q l x4', $type, SEEK_SET, $start, 10, 0) };
    show('fcntl', fcntl($f, F_SETLK, $range->(F_WRLCK, 10)));
    for my $start (0, 10, 15, 20) {
        my $pid = fork() || do { open(my $g, '+<', 'f'); POSIX::_exit(fcntl($g, F_SETLK, $range->(F_WRLCK, $start)) ? 0 : 1) };
        waitpid($pid, 0); print "from $start: ", $? >> 8, "\n";
    }
};

section 'FIFOs and sockets' => sub {
    show('mkfifo', POSIX::mkfifo('p', 0640)); about('p');
    my $pid = fork() || do { open(my $w, '>', 'p'); syswrite($w, 'through'); POSIX::_exit(0) };
    print slurp('p'), "\n"; waitpid($pid, 0);
    socket(my $s, AF_UNIX, SOCK_STREAM, 0); show('bind', bind($s, pack_sockaddr_un('sock'))); listen($s, 1);
    socket(my $c, AF_UNIX, SOCK_STREAM, 0); show('connect', connect($c, pack_sockaddr_un('sock')));
    accept(my $a, $s); syswrite($c, 'hello'); sysread($a, my $text, 10); print "$text\n"; about('sock');
    close($s); socket($c, AF_UNIX, SOCK_STREAM, 0); show('nobody listens', connect($c, pack_sockaddr_un('sock')));
};

section 'times' => sub {
    spill('f', ''); show('utime', utime(981173106, 981173107, 'f')); print join(' ', (stat('f'))[8, 9]), "\n";
    utime(4000000000, 4000000000, 'f'); print +(stat('f'))[9], "\n"; utime(-5, -5, 'f'); print +(stat('f'))[9], "\n";
    open(my $f, '>>', 'f'); syswrite($f, 'x'); print abs((stat('f'))[9] - time()) < 600 ? "now\n" : "other\n";
    utime(1, 1, '.'); spill('new', ''); print +(stat('.'))[9] > 1 ? "changed\n" : "not\n";
    my $before = (lstat('f'))[10]; chmod(0600, 'f'); print +(lstat('f'))[10] >= $before ? "ctime\n" : "not\n";
    spill('n', ''); my ($n, $t) = ('n', pack('q4', 1, 123456789, 2, 987654321));
    show('utimensat', syscall(280, -100, $n, $t, 0)); my $s = "\0" x 256; syscall(4, $n, $s); print join(' ', (unpack('Q3 L2 x8 Q3 q q q q', $s))[8, 9, 10, 11]), "\n";
};

section 'extended attributes' => sub {
    my ($f, $n, $v, $b) = ('f', 'user.color', 'blue', "\0" x 70000); spill($f, '');
    show('set', syscall(188, $f, $n, $v, 4, 0)); my $l = syscall(191, $f, $n, $b, 64); print substr($b, 0, $l), "\n";
    show('create again', syscall(188, $f, $n, $v, 4, 1)); my $m = 'user.none'; show('get none', syscall(191, $f, $m, $b, 64));
    show('replace none', syscall(188, $f, $m, $v, 4, 2)); show('too small', syscall(191, $f, $n, $b, 2)); show('its size', syscall(191, $f, $n, $b, 0));
    $l = syscall(194, $f, $b, 64); print join('|', grep { /^user/ } split(/\0/, substr($b, 0, $l))), "\n";
    my $large = 'v' x 2000; show('large', syscall(188, $f, $m, $large, 2000, 0)); my $bad = 'nonsense'; show('no namespace', syscall(188, $f, $bad, $v, 4, 0));
    show('remove', syscall(197, $f, $n)); show('remove again', syscall(197, $f, $n));
    symlink($f, 's'); my $s = 's'; show('on a link', syscall(189, $s, $n, $v, 4, 0)); mkdir('d'); my $d = 'd'; show('on a folder', syscall(188, $d, $n, $v, 4, 0));
};

section 'many files in a folder' => sub {
    spill(sprintf('file%04d', $_), '') for 0 .. 59;
    my @all = split(/ /, names('.')); print scalar(@all), " $all[0] $all[59]\n";
    # Removed while they are listed.
    opendir(my $d, '.'); while (my $name = readdir($d)) { unlink($name) if $name =~ /^file/ } print names('.'), "|\n";
    my @numbers = map { spill("i$_", ''); (stat("i$_"))[1] } 0 .. 9; my %seen; @seen{@numbers} = (); print scalar(keys(%seen)), "\n";
};

section 'opening' => sub {
    spill('f', 'text'); mkdir('d'); symlink('f', 's');
    for my $flags (O_RDWR | O_CREAT | O_EXCL, O_RDONLY | O_NOFOLLOW, O_RDONLY | O_DIRECTORY, O_WRONLY | O_TRUNC, O_RDONLY | 010000000) {
        for my $name ('f', 's', 'd', 'none') { show("$name " . sprintf('%o', $flags), sysopen(my $h, $name, $flags, 0644)); spill('f', 'text') if $name eq 'f' }
    }
    show('through a file', -e 'f/x'); show('readdir of a file', opendir(my $x, 'f')); sysopen(my $d, 'd', O_RDONLY); show('read a folder', sysread($d, my $b, 1));
};

section 'what an unprivileged user may' => sub {
    spill('secret', 's'); chmod(0600, 'secret'); mkdir($_) for 'open', 'closed', 'sticky', 'group';
    chmod(0777, 'open'); chmod(0700, 'closed'); chmod(01777, 'sticky'); spill('sticky/theirs', ''); chown(0, 50, 'group'); chmod(02777, 'group');
    as_user(1000, sub {
        print slurp('secret'), ' ', names('closed'), "\n"; show('in closed', spill('closed/x', '') ? 1 : undef); show('in sticky', unlink('sticky/theirs') ? 1 : undef);
        show('out of sticky', rename('sticky/theirs', 'open/theirs')); spill('open/mine', 'x'); show('give away', chown(0, 0, 'open/mine') || undef);
        chmod(04755, 'open/mine'); mkdir('open/m'); symlink('x', 'open/y'); about('open/mine', 'open/m', 'open/y');
        spill('group/f', ''); mkdir('group/d'); chmod(02755, 'group/f'); about('group/f', 'group/d'); show('times of another', utime(1, 1, 'sticky/theirs') || undef);
        show('mode of another', chmod(0777, 'sticky/theirs') || undef); show('link of another', link('sticky/theirs', 'open/linked'));
        open(my $f, '>>', 'open/mine'); syswrite($f, 'more'); about('open/mine');
    });
    chmod(06755, 'open/mine'); as_user(1001, sub { show('write of another', open(my $f, '>>', 'open/mine') || undef) });
    chmod(06777, 'open/mine'); as_user(1001, sub { open(my $f, '>>', 'open/mine'); syswrite($f, 'bits'); }); about('open/mine');
    as_user(1000, sub { chmod(06777, 'open/mine'); truncate('open/mine', 1) }); about('open/mine');
};
print "== end\n";
